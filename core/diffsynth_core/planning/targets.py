"""What a run trains: components in full, and the modules that receive LoRA."""

from dataclasses import dataclass

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import DiffSynthError, Problem, shorten, suggest
from diffsynth_core.families.interface import (
    ComponentFacts,
    ComponentFiles,
    FamilyFacts,
    Layout,
    Shapes,
    is_below,
    match_targets,
    modules_with_weights,
)
from diffsynth_core.planning.components import FoundComponents
from diffsynth_core.state_dicts.lora_files import check_lora_file
from diffsynth_core.state_dicts.lora_names import DIALECTS


@dataclass(frozen=True)
class Training:
    """The trained parts of a run.

    `lora_modules`: by their documented names.
    `left_out`: modules that the LoRA targets address and that no gradient can reach.
    """

    full: tuple[str, ...]
    lora_component: str | None
    lora_modules: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def components(self) -> frozenset[str]:
        """Components whose weights or LoRA train."""
        return frozenset((*self.full, *([self.lora_component] if self.lora_component else [])))


def find_training(
    parameters: Parameters, found: FoundComponents, invalid: frozenset[str], problems: list[Problem]
) -> Training:
    """What the parameters ask to train, among the components that are there. Adds to `problems`."""
    full = tuple(
        name for name in parameters.trainable_models if _check_component(name, "trainable_models", found, problems)
    )
    problems += [
        _rounded(found.components[name]) for name in full if name in found.components and found.components[name].float8
    ]
    lora_component = parameters.lora_base_model
    if lora_component and not _check_component(lora_component, "lora_base_model", found, problems):
        lora_component = None
    if not parameters.trainable_models and not parameters.lora_base_model and "lora_base_model" not in invalid:
        problems.append(
            Problem(
                "nothing is named to train",
                f"give `--lora_base_model {found.facts.denoiser}` for a LoRA, "
                f"or `--trainable_models {found.facts.denoiser}` for full training",
                wrong_use=True,
            )
        )
    _check_lora_options(parameters, found.facts, problems)
    modules: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if lora_component and lora_component in found.shapes and "lora_target_modules" not in invalid:
        modules, left_out = _lora_modules(parameters, lora_component, found, problems)
        shapes = found.components[lora_component].layout.documented_shapes(found.shapes[lora_component])
        _check_lora_checkpoint(parameters, found.facts.component(lora_component), shapes, problems)
    return Training(full, lora_component, modules, left_out)


def _rounded(files: ComponentFiles) -> Problem:
    """The problem that weights train that are stored in so few numbers that most steps would not move them."""
    return Problem(
        f"`trainable_models` names `{files.component}`, whose files `fp8_models` keeps in 8-bit floats: `{files.origin}`",
        f"take them out of `fp8_models`, or train a LoRA: `--lora_base_model {files.component}`",
        wrong_use=True,
    )


def _check_component(name: str, parameter: str, found: FoundComponents, problems: list[Problem]) -> bool:
    known = found.facts.component_names
    if name in known:
        return True
    near = suggest(name, known)
    hint = f"did you mean `{near}`?" if near else f"components of {found.facts.title}: {', '.join(known)}"
    problems.append(
        Problem(f"`{parameter}` names `{name}`, which is no component of {found.facts.title}", hint, wrong_use=True)
    )
    return False


def _check_lora_options(parameters: Parameters, facts: FamilyFacts, problems: list[Problem]) -> None:
    if parameters.lora_format != "diffsynth" and parameters.lora_base_model not in (None, facts.denoiser):
        problems.append(
            Problem(
                f"`lora_format` `{parameters.lora_format}` has names for {facts.denoiser} only, "
                f"`lora_base_model` is `{parameters.lora_base_model}`",
                "give `--lora_format diffsynth`",
                wrong_use=True,
            )
        )
    naming = facts.component(facts.denoiser).lora_naming
    if parameters.lora_base_model == facts.denoiser and not naming.known(parameters.lora_format):
        known = " or ".join(f"`--lora_format {name}`" for name in filter(naming.known, DIALECTS))
        problems.append(
            Problem(
                f"`lora_format` `{parameters.lora_format}` has no names for the {facts.denoiser} of {facts.title}",
                f"give {known}",
                wrong_use=True,
            )
        )
    if parameters.lora_checkpoint and not parameters.lora_base_model:
        problems.append(
            Problem(
                "`lora_checkpoint` is given without `lora_base_model`",
                "name the component that receives it with `--lora_base_model`",
                wrong_use=True,
            )
        )


def _lora_modules(
    parameters: Parameters, component: str, found: FoundComponents, problems: list[Problem]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Documented names of the modules that receive LoRA, and of those left out, which no gradient can reach."""
    facts = found.facts.component(component)
    targets = parameters.lora_target_modules or facts.lora_targets
    if not targets:
        problems.append(
            Problem(
                f"`{component}` has no documented LoRA targets",
                "name them with `--lora_target_modules`",
                wrong_use=True,
            )
        )
        return (), ()
    layout, shapes = found.components[component].layout, found.shapes[component]
    modules = modules_with_weights(layout.documented_shapes(shapes))
    matches = match_targets(modules, targets)
    problems += [_unmatched(target, modules, layout, shapes, facts) for target, names in matches.items() if not names]
    own_names = {name: layout.documented.ours(name) or () for names in matches.values() for name in names}
    dead = found.variant.untrainable(facts, frozenset(shapes))
    alive = tuple(sorted(name for name, own in own_names.items() if not all(is_below(part, dead) for part in own)))
    if own_names and not alive:
        problems.append(
            Problem(
                f"`lora_target_modules` addresses only modules that no gradient can reach: {shorten(sorted(own_names))}",
                "name other modules",
                wrong_use=True,
            )
        )
    return alive, tuple(sorted(own_names.keys() - set(alive)))


def _unmatched(target: str, modules: frozenset[str], layout: Layout, shapes: Shapes, facts: ComponentFacts) -> Problem:
    """The problem that a target addresses nothing, with what it is called here, or the nearest ending of a name."""
    parts = match_targets(modules_with_weights(shapes), (target,))[target]
    called = frozenset(filter(None, map(layout.documented.theirs, parts)))
    addressing = [name for name, found in match_targets(called, facts.lora_targets).items() if found]
    endings = {".".join(name.split(".")[depth:]) for name in modules for depth in (-1, -2)}
    near = suggest(target, endings)
    if addressing:
        hint = f"in the documented names that is {shorten(addressing)}"
    elif near:
        hint = f"did you mean `{near}`?"
    else:
        hint = f"the documented targets are {', '.join(facts.lora_targets) or 'none'}"
    return Problem(f"`lora_target_modules`: no module of {facts.name} ends with `{target}`", hint, wrong_use=True)


def _check_lora_checkpoint(
    parameters: Parameters, component: ComponentFacts, shapes: Shapes, problems: list[Problem]
) -> None:
    path = parameters.lora_checkpoint
    if path is None:
        return
    if not path.is_file():
        problems.append(Problem(f"`lora_checkpoint` `{path}` is not there", "correct the path"))
        return
    try:
        modules = {name: shapes[f"{name}.weight"] for name in modules_with_weights(shapes)}
        ranks = check_lora_file(path, modules, component.lora_naming)
    except DiffSynthError as error:
        problems += error.problems
        return
    other = sorted({rank for rank in ranks.values() if rank != parameters.lora_rank})
    if other:
        problems.append(
            Problem(
                f"`{path}` has rank {other[0]}, `lora_rank` is {parameters.lora_rank}",
                f"give `--lora_rank {other[0]}`",
                wrong_use=True,
            )
        )
