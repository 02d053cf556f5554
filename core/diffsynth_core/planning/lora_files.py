"""LoRA files that a run starts from: the trained one's start, and the preset one merged into the base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import DiffSynthError, Problem, shorten
from diffsynth_core.families.interface import modules_with_weights
from diffsynth_core.planning.components import FoundComponents
from diffsynth_core.planning.trained import check_component
from diffsynth_core.state_dicts.lora_files import LoraFile, check_lora_file, read_lora_file


@dataclass(frozen=True)
class PresetLora:
    """A LoRA that is merged into a component before training; `shapes`: of the component's weights by documented
    module."""

    component: str
    file: LoraFile
    shapes: Mapping[str, tuple[int, ...]]


def check_lora_checkpoint(
    parameters: Parameters,
    component: str,
    trained: Collection[str],
    found: FoundComponents,
    invalid: frozenset[str],
    problems: list[Problem],
) -> None:
    """Prove that `lora_checkpoint` has the start of a LoRA on `trained` modules; adds to `problems`.

    It may leave some of them out. What it has for other modules of the component is passed over.
    """
    path = parameters.lora_checkpoint
    if path is None or not _is_there(path, "lora_checkpoint", problems):
        return
    try:
        naming = found.facts.component(component).lora_naming
        ranks = check_lora_file(path, _module_shapes(component, found), naming)
    except DiffSynthError as error:
        problems += error.problems
        return
    if "lora_rank" not in invalid:
        problems += _rank_problems(path, {name: ranks[name] for name in ranks if name in trained}, parameters.lora_rank)
    if trained and not ranks.keys() & set(trained):
        problems.append(
            Problem(
                f"`{path}` has a LoRA for none of the {len(trained)} modules that train; it has {shorten(sorted(ranks))}",
                "name a LoRA of these modules, or other `--lora_target_modules`",
                wrong_use=True,
            )
        )


def _rank_problems(path: Path, ranks: Mapping[str, int], asked: int) -> list[Problem]:
    """The problem that the trained modules have another rank in a file than asked for, or not all the same."""
    modules = {rank: sorted(name for name in ranks if ranks[name] == rank) for rank in sorted(set(ranks.values()))}
    if not modules.keys() - {asked}:
        return []
    if len(modules) == 1:
        (rank,) = modules
        return [
            Problem(f"`{path}` has rank {rank}, `lora_rank` is {asked}", f"give `--lora_rank {rank}`", wrong_use=True)
        ]
    listed = ", ".join(f"{rank} at `{names[0]}` ({len(names)} in all)" for rank, names in modules.items())
    return [
        Problem(
            f"`{path}` has several ranks: {listed}; the LoRA that trains has one, {asked}",
            "merge it into the base with `--preset_lora_path`, or name a LoRA of one rank",
            wrong_use=True,
        )
    ]


def find_preset(parameters: Parameters, found: FoundComponents, problems: list[Problem]) -> PresetLora | None:
    """The LoRA that `preset_lora_path` names, proven to fit its component. Adds to `problems`."""
    path, component = parameters.preset_lora_path, parameters.preset_lora_model
    if path is None and component is not None:
        what, hint = "`preset_lora_model` is given without `preset_lora_path`", "name the LoRA file, or leave it out"
        problems.append(Problem(what, hint, wrong_use=True))
    elif path is not None and component is None:
        likely = parameters.lora_base_model or found.facts.denoiser
        what, hint = "`preset_lora_path` is given without `preset_lora_model`", f"give `--preset_lora_model {likely}`"
        problems.append(Problem(what, hint, wrong_use=True))
    there = path is not None and _is_there(path, "preset_lora_path", problems)
    if component is None or not check_component(component, "preset_lora_model", found, problems):
        return None
    files = found.components.get(component)
    if path is None or not there or files is None:
        return None
    if files.float8:
        problems.append(
            Problem(
                f"`preset_lora_path` cannot be merged into `{component}`, whose files `fp8_models` keeps in 8-bit floats: "
                "most of the change would be lost in rounding",
                "take them out of `fp8_models`",
                wrong_use=True,
            )
        )
        return None
    shapes, naming = _module_shapes(component, found), found.facts.component(component).lora_naming
    try:
        return PresetLora(component, read_lora_file(path, shapes, naming), shapes)
    except DiffSynthError as error:
        problems += error.problems
        return None


def _is_there(path: Path, parameter: str, problems: list[Problem]) -> bool:
    if not path.is_file():
        problems.append(Problem(f"`{parameter}` `{path}` is not there", "correct the path"))
        return False
    return True


def _module_shapes(component: str, found: FoundComponents) -> dict[str, tuple[int, ...]]:
    """Weight shapes of a component's modules, by their documented names."""
    shapes = found.components[component].layout.documented_shapes(found.shapes[component])
    return {name: shapes[f"{name}.weight"] for name in modules_with_weights(shapes)}
