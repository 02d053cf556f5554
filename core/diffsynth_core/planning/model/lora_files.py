"""LoRA files of a run: one that initializes the trained LoRA, and one that is merged into the base."""

import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import DiffSynthError, Problem, list_names, report
from diffsynth_core.models.spec import modules_with_weights
from diffsynth_core.models.weight_store import find_store
from diffsynth_core.planning.model.model_plan import FusedLora, ModelPlan
from diffsynth_core.planning.model.storage import storage_flag
from diffsynth_core.planning.training.trained import check_component
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.lora import Lora, group_by_a, pairs_of
from diffsynth_core.weights.lora_files import ANOTHER, read_lora_file


@dataclass(frozen=True)
class LoraStart:
    """The file that initializes a LoRA.

    Attributes:
        ranks: its ranks for the modules that train; the run's rank is the highest.
        joined: number of these modules for which it has several LoRAs (separate q, k, v with different lora_A).
    """

    path: Path
    ranks: Mapping[str, int]
    joined: int

    @property
    def note(self) -> str:
        """Remark for the user."""
        text = f"LoRA initialized from `{self.path}`: {pluralize(len(self.ranks), 'module')}"
        if self.joined:
            text += f"; at {self.joined} of them, the LoRAs of separate q, k, v are fused into one with the sum of their ranks"
        if len(set(self.ranks.values())) > 1:
            counts = Counter(self.ranks.values())
            listed = ", ".join(f"{rank} at {counts[rank]}" for rank in sorted(counts))
            text += f"; ranks {listed}: the lower ones are padded with newly initialized rows, which have no effect at the start"
        return text


def check_lora_checkpoint(
    parameters: Parameters,
    component: str,
    trained: Collection[str],
    found: ModelPlan,
    invalid: frozenset[str],
) -> LoraStart | None:
    """Check that `lora_checkpoint` can initialize a LoRA on the `trained` modules; report what prevents it.

    It may lack some of them. What it has for other modules of the component is skipped.
    """
    path = parameters.lora_checkpoint
    if path is None or not _is_there(path, "lora_checkpoint"):
        return None
    try:
        file = read_lora_of(path, component, found)
    except DiffSynthError as error:
        report(*error.problems)
        return None
    if file.tensors:
        report(_differences_problem(path, component, file, _removal(path, component, found)))
        return None
    ranks = file.ranks
    if "lora_rank" not in invalid:
        report(*_rank_problems(path, {name: ranks[name] for name in ranks if name in trained}, parameters.lora_rank))
    if trained and not ranks.keys() & set(trained):
        report(
            Problem(
                f"`{path}` has no LoRA for the {pluralize(len(trained), 'trained module')}; it has {list_names(sorted(ranks))}",
                "use a LoRA of these modules, or other `--lora_target_modules`",
                wrong_use=True,
            )
        )
    own = {name: rank for name, rank in ranks.items() if name in trained}
    joined = sum(len(group_by_a(pairs_of(file.modules[name]))) > 1 for name in own)
    return LoraStart(path, own, joined)


def _removal(path: Path, component: str, found: ModelPlan) -> str | None:
    """Return the hint to remove keys of other components from the LoRA; None if that is not possible."""
    if component != found.facts.denoiser:
        return None
    output = path.with_name(f"{path.stem}-{component}{path.suffix}")
    return (
        f"remove these keys with `diffsynth convert-lora {shlex.quote(str(path))} --to diffsynth "
        f"--family {found.facts.name} --allow_unmatched -o {shlex.quote(str(output))}`, and pass that file"
    )


def _or_another(removal: str | None) -> str:
    """Return the hint for keys of other components."""
    return f"use a LoRA of this model, or {removal}" if removal else ANOTHER


def _differences_problem(path: Path, component: str, file: Lora, removal: str | None) -> Problem:
    """Return the problem of full-weight differences, from which a LoRA cannot be initialized."""
    what = (
        f"`{path}` changes {pluralize(len(file.tensors), 'tensor')} by full-weight differences, which a LoRA cannot be initialized "
        f"from: {list_names(sorted(file.tensors))}"
    )
    hints = [f"merge it into the base with `--preset_lora_path {path} --preset_lora_model {component}`"]
    if file.modules and removal:
        hints.append(removal)
    return Problem(what, ", or ".join(hints), wrong_use=True)


def _rank_problems(path: Path, ranks: Mapping[str, int], asked: int) -> list[Problem]:
    """Return the problem of another rank in the file than requested; the highest rank counts."""
    modules = {rank: sorted(name for name in ranks if ranks[name] == rank) for rank in sorted(set(ranks.values()))}
    if not modules or max(modules) == asked:
        return []
    rank = max(modules)
    if len(modules) == 1:
        what = f"`{path}` has rank {rank}, but `lora_rank` is {asked}"
    else:
        listed = ", ".join(f"{rank} at `{names[0]}` ({len(names)} in total)" for rank, names in modules.items())
        what = f"`{path}` has several ranks: {listed}; the trained LoRA needs the highest, but `lora_rank` is {asked}"
    return [Problem(what, f"pass `--lora_rank {rank}`", wrong_use=True)]


def find_fused_lora(parameters: Parameters, found: ModelPlan) -> FusedLora | None:
    """Return the LoRA of `preset_lora_path`, checked against its component. Reports problems."""
    path, component = parameters.preset_lora_path, parameters.preset_lora_model
    if path is None and component is not None:
        what, hint = "`preset_lora_model` is set without `preset_lora_path`", "set the LoRA file, or remove it"
        report(Problem(what, hint, wrong_use=True))
    elif path is not None and component is None:
        likely = parameters.lora_base_model or found.facts.denoiser
        what, hint = "`preset_lora_path` is set without `preset_lora_model`", f"pass `--preset_lora_model {likely}`"
        report(Problem(what, hint, wrong_use=True))
    there = path is not None and _is_there(path, "preset_lora_path")
    if component is None or not check_component(component, "preset_lora_model", found):
        return None
    files = found.components.get(component)
    if path is None or not there or files is None:
        return None
    if not (store := find_store(files.storage)).trains:
        flag = storage_flag(files.storage)
        report(
            Problem(
                f"`preset_lora_path` cannot be merged into `{component}`, whose files `{flag}` keeps in {store.title}: "
                "most of the change would be lost in rounding",
                f"remove them from `{flag}`",
                wrong_use=True,
            )
        )
        return None
    try:
        return FusedLora(component, read_lora_of(path, component, found), tensor_shapes(component, found))
    except DiffSynthError as error:
        report(*error.problems)
        return None


def _is_there(path: Path, parameter: str) -> bool:
    if not path.is_file():
        report(Problem(f"`{parameter}` `{path}` does not exist", "correct the path"))
        return False
    return True


def read_lora_of(path: Path, component: str, found: ModelPlan) -> Lora:
    """Return the LoRA in a file, matched to the modules of a component.

    Raises:
        DiffSynthError: as `read_lora_file`.
    """
    shapes, naming = tensor_shapes(component, found), found.facts.component(component).lora_naming
    way_out = _or_another(_removal(path, component, found))
    return read_lora_file(path, _module_shapes(shapes), naming, tensor_shapes=shapes, way_out=way_out)


def tensor_shapes(component: str, found: ModelPlan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's tensors, by public name."""
    return found.components[component].layout.public_shapes(found.shapes[component])


def _module_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of modules, given those of tensors."""
    return {name: shapes[f"{name}.weight"] for name in modules_with_weights(shapes)}
