"""What a run trains: components in full, and modules that receive LoRA."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from diffsynth_core.config.choices import LoraFormat, TrainedDtype
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, report
from diffsynth_core.models.spec import ComponentFiles, FamilyFacts, Layout
from diffsynth_core.models.weight_store import find_store
from diffsynth_core.planning.model.lora_files import LoraStart, check_lora_checkpoint
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.model.storage import storage_flag
from diffsynth_core.planning.training.lora_targets import LoraTargets, find_lora_targets
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.trained import check_component, find_trained, prefix_problems
from diffsynth_core.weights.lora_formats import LORA_FORMATS


@dataclass(frozen=True)
class Training:
    """The trained parts of a run.

    Attributes:
        full: components that train in full.
        parts: component -> public names of the modules (or single weights) that train.
        lora_modules: by public name.
        untrainable_targets: selected modules that receive no gradient.
        start: file that initializes the LoRA.
        skipped_modules: modules of the kinds that receive LoRA, in blocks that the targets omit.
        lora_rule: how the modules were selected if not by suffixes, in words.
        optimizer: name in the table of optimizers (planning/training/optimizers.py) and its options.
        dtype: of weights that train in full; a LoRA is float32.
        timesteps, loss: names in the tables of training/timesteps.py and training/losses.py.
    """

    full: tuple[str, ...]
    lora_component: str | None
    lora_modules: tuple[str, ...]
    untrainable_targets: tuple[str, ...]
    lora_rule: str | None = None
    skipped_modules: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    start: LoraStart | None = None
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    dtype: TrainedDtype = "float32"
    timesteps: str = "uniform"
    loss: str = "mse"

    @property
    def components(self) -> frozenset[str]:
        """Components with trained weights or LoRA."""
        return frozenset((*self.full, *self.parts, *([self.lora_component] if self.lora_component else [])))

    def weights(self, component: str, layout: Layout, names: Collection[str]) -> frozenset[str]:
        """Return those of a component's tensors, by module key, that are trained and saved without LoRA."""
        return frozenset(names) if component in self.full else layout.below(self.parts.get(component, ()), names)

    def float32_weights(self, component: str, layout: Layout, names: Collection[str]) -> frozenset[str]:
        """Return those that are float32 because they train: rounded to nearest in fewer bits, most steps would not move
        them.
        """
        return self.weights(component, layout, names) if self.dtype == "float32" else frozenset()


NOTHING_TRAINS = Training((), None, (), ())
"""Of a precompute task."""


def find_training(parameters: Parameters, found: ModelPlan, invalid: frozenset[str]) -> Training:
    """Return what the parameters select for training among the components. Reports problems."""
    full, parts = find_trained(parameters, found)
    changing = [found.components[name] for name in (*full, *parts) if name in found.components]
    report(*[_rounded(files) for files in changing if not find_store(files.storage).trains])
    lora_component = parameters.lora_base_model
    if lora_component and not check_component(lora_component, "lora_base_model", found):
        lora_component = None
    if not parameters.trainable_models and not parameters.lora_base_model and "lora_base_model" not in invalid:
        report(
            Problem(
                "nothing to train",
                f"pass `--lora_base_model {found.facts.denoiser}` for a LoRA, "
                f"or `--trainable_models {found.facts.denoiser}` for full training",
                wrong_use=True,
            )
        )
    if parameters.trained_dtype == "bf16" and not parameters.trainable_models:
        what = f"`trained_dtype` `{parameters.trained_dtype}` is about weights that train in full; a LoRA is float32"
        report(Problem(what, "remove it", wrong_use=True))
    _check_lora_options(parameters, found.facts)
    report(*prefix_problems(parameters, found.facts))
    targets, start = LoraTargets(), None
    if lora_component and lora_component in found.shapes:
        if "lora_target_modules" not in invalid:
            targets = find_lora_targets(parameters, lora_component, found)
        start = check_lora_checkpoint(parameters, lora_component, targets.modules, found, invalid)
    return Training(
        full=full,
        lora_component=lora_component,
        lora_modules=targets.modules,
        untrainable_targets=targets.untrainable_targets,
        lora_rule=targets.rule,
        skipped_modules=targets.skipped_modules,
        parts=parts,
        start=start,
    )


def _rounded(files: ComponentFiles) -> Problem:
    """Return the problem of trained weights in a dtype so coarse that most steps would not change them."""
    flag, title = storage_flag(files.storage), find_store(files.storage).title
    return Problem(
        f"`trainable_models` names `{files.component}`, whose files `{flag}` keeps in {title}: `{files.origin}`",
        f"remove them from `{flag}`, or train a LoRA: `--lora_base_model {files.component}`",
        wrong_use=True,
    )


def _check_lora_options(parameters: Parameters, facts: FamilyFacts) -> None:
    if parameters.align_to_opensource_format and not parameters.lora_base_model:
        report(
            Problem(
                "`align_to_opensource_format` is set without `lora_base_model`: it only affects the keys of a LoRA",
                "remove it",
                wrong_use=True,
            )
        )
    if parameters.lora_format != "diffsynth" and parameters.lora_base_model not in (None, facts.denoiser):
        report(
            Problem(
                f"`lora_format` `{parameters.lora_format}` only supports {facts.denoiser}, but "
                f"`lora_base_model` is `{parameters.lora_base_model}`",
                "pass `--lora_format diffsynth`",
                wrong_use=True,
            )
        )
    naming = facts.component(facts.denoiser).lora_naming
    if parameters.lora_base_model == facts.denoiser and not naming.written(parameters.lora_format):
        report(_not_written(parameters.lora_format, facts))
    if parameters.lora_checkpoint and not parameters.lora_base_model:
        report(
            Problem(
                "`lora_checkpoint` is set without `lora_base_model`",
                "set the component to apply it to with `--lora_base_model`",
                wrong_use=True,
            )
        )


def _not_written(lora_format: LoraFormat, facts: FamilyFacts) -> Problem:
    """Return the problem that a format has no names for the denoiser's modules."""
    naming = facts.component(facts.denoiser).lora_naming
    if naming.known(lora_format):
        return Problem(
            f"`lora_format` `{lora_format}` fuses several modules of the {facts.denoiser} of {facts.title}, which would "
            "raise the rank of its LoRA",
            f"pass `--lora_format diffsynth`, and convert the file with `diffsynth convert-lora --to {lora_format}`",
            wrong_use=True,
        )
    written = " or ".join(f"`--lora_format {name}`" for name in filter(naming.written, LORA_FORMATS))
    return Problem(
        f"`lora_format` `{lora_format}` does not support the {facts.denoiser} of {facts.title}",
        f"pass {written}",
        wrong_use=True,
    )
