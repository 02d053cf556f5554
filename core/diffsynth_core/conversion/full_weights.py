"""The full weights of a checkpoint's components as `split-ckpt` writes them: names, dtype, folders. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.config.choices import LayoutName, LoraFormat, SplitDtype, SplitLayout
from diffsynth_core.conversion.key_owners import KeyOwners
from diffsynth_core.conversion.recast import recast, rounded_layers
from diffsynth_core.conversion.row_spans import RowSpans, row_spans
from diffsynth_core.conversion.translation import Translated, find_reading, translate
from diffsynth_core.errors import DiffSynthError, Problem, collect_problems, list_names, raise_if_any, report
from diffsynth_core.models.recognition import facts_of
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.base_files import FLOAT8
from diffsynth_core.weights.weight_sets import WeightSet
from diffsynth_core.weights.weight_writer import OutputTensor

NAMES_OF = {"original": "the original", "comfyui": "ComfyUI's"}
"""Layout -> whose names a component may lack."""


@dataclass(frozen=True)
class SplitChoices:
    """The user's choices.

    Attributes:
        layout: what full weights are written as; None: files with unchanged names.
        dtype: dtype of full weights; None: unchanged.
        configs: `component=path` of a config.json or its folder, or the path alone where there is one component; of
            others it is that of the run's base model, or inferred from shapes.
        lora_format: format of LoRAs; None: unchanged.
        max_shard_bytes: maximum bytes of tensors in one file; None: unlimited.
    """

    default_component: str | None = None
    family: str | None = None
    layout: SplitLayout | None = None
    dtype: SplitDtype | None = None
    configs: tuple[str, ...] = ()
    lora_format: LoraFormat | None = None
    max_shard_bytes: int | None = None
    allow_unmatched: bool = False


@dataclass(frozen=True)
class Part:
    """The content of one output: the full weights or the LoRA of a component, by name.

    Attributes:
        stem: path of its file below the output folder, without ending.
        prefix: prefix of its names in the checkpoint; None if they, or the values, differ otherwise.
        config: config.json next to it; None: none is written.
    """

    component: str
    stem: str
    tensors: tuple[OutputTensor, ...]
    prefix: str | None
    config: str | None = None


def full_parts(
    weights: WeightSet, owners: KeyOwners, family: FamilyFacts | None, choices: SplitChoices
) -> tuple[list[Part], list[str]]:
    """Return the full weights of each component as requested, and remarks for the user.

    Raises:
        FaultsFound: if tensors have no name in the layout, or cannot be in the dtype or the folder.
    """
    parts: list[Part] = []
    notes: list[str] = []
    with collect_problems() as problems:
        configs = _given_configs(owners, choices)
        if choices.layout == "pretrained" and family:
            from diffsynth_core.conversion.pretrained import configs_of_run  # imports torch

            configs = {**configs_of_run(weights, family), **configs}
        for component, names in owners.full.items():
            stored = {name: row_spans(weights, key) for name, key in names.items()}
            part = Part(component, component, (), common_prefix(names))
            if choices.layout:
                part, tensors = _in_layout(part, stored, family, choices, configs, notes)
            else:
                tensors = stored
            if choices.dtype:
                part = replace(part, tensors=_in_dtype(component, tensors, choices.dtype, notes), prefix=None)
            else:
                part = replace(part, tensors=tuple(tensor.output(name) for name, tensor in tensors.items()))
            parts += [part] if part.tensors else []
    raise_if_any(problems)
    return parts, notes


def common_prefix(names: Mapping[str, str]) -> str | None:
    """Return the common prefix of keys before their names in the component; None if they differ.

    Args:
        names: name in the component -> key.
    """
    prefixes = {key.removesuffix(name) if key.endswith(name) else None for name, key in names.items()}
    return prefixes.pop() if len(prefixes) == 1 else None


def counted(names: Sequence[str]) -> str:
    """Return the number of tensors and some of their names."""
    return f"{pluralize(len(names), 'tensor')}, {list_names(names)}"


def _given_configs(owners: KeyOwners, choices: SplitChoices) -> dict[str, Path]:
    """Return the config.json that the user passes for each component; what is wrong with them is reported."""
    if choices.configs and choices.layout != "pretrained":
        report(Problem("`--config` requires `--layout pretrained`", "pass both or none", wrong_use=True))
        return {}
    if choices.layout == "pretrained" and choices.dtype == "fp8_scaled":
        what = (
            "`--layout pretrained` cannot be combined with `--dtype fp8_scaled`: `from_pretrained` ignores the scales"
        )
        report(Problem(what, "pass `--layout comfyui`, or another `--dtype`", wrong_use=True))
    found: dict[str, Path] = {}
    for text in choices.configs:
        component, given, path = text.rpartition("=")
        named = [component] if given else list(owners.full)
        place = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        known = f"the checkpoint has full weights of {', '.join(owners.full)}"
        if len(named) > 1:
            report(
                Problem(
                    f"`--config {text}` does not name its component; {known}", f"pass `NAME={path}`", wrong_use=True
                )
            )
        elif named[0] not in owners.full or named[0] in found:
            what = "names the component twice" if named[0] in found else "names another component"
            report(Problem(f"`--config {text}` {what}; {known}", "pass one for each of these at most", wrong_use=True))
        elif not place.is_file():
            report(Problem(f"`--config {text}`: `{place}` does not exist", "correct the path", wrong_use=True))
        else:
            found[named[0]] = place
    return found


def _in_layout(
    part: Part,
    stored: Mapping[str, RowSpans],
    family: FamilyFacts | None,
    choices: SplitChoices,
    configs: Mapping[str, Path],
    notes: list[str],
) -> tuple[Part, Mapping[str, RowSpans]]:
    """Return a part and its tensors by the names of the requested layout; none if a problem was reported."""
    assert choices.layout
    component, facts = part.component, facts_of(part.component, family)
    if family is None or facts is None:
        of = f"of {family.title}" if family else "of an unknown family"
        what = f"`--layout {choices.layout}` is not available for the component `{component}` {of}"
        report(Problem(what, "remove `--layout`" if family else "pass `--family`"))
        return part, {}
    reading, layout = find_reading(facts, stored)
    # Module keys are the names of diffusers and transformers.
    key_names: LayoutName = "diffusers" if choices.layout == "pretrained" else choices.layout
    writing = facts.names_in(key_names, layout)
    if writing is None:
        what = f"{NAMES_OF[key_names]} names of the component `{component}` of {family.title} are not known"
        report(Problem(what, "remove `--layout`, or choose another"))
        return part, {}
    translated = translate(stored, reading, writing)
    faults = _translation_problems(component, translated, choices)
    report(*faults)
    notes += _translation_notes(component, translated)
    if choices.layout == "pretrained" and not faults:
        part = _in_folder(part, family, facts, translated.tensors, configs.get(component), notes)
    elif list(translated.tensors) != list(stored):
        part = replace(part, prefix=None)
    return part, translated.tensors


def _translation_problems(component: str, translated: Translated, choices: SplitChoices) -> list[Problem]:
    faults = {
        f"without a name in the layout `{choices.layout}`": () if choices.allow_unmatched else translated.unknown,
        f"with shapes or dtypes that do not fit the layout `{choices.layout}`": translated.misshapen,
    }
    problems = [
        Problem(f"{pluralize(len(names), 'tensor')} of `{component}` {what}: {list_names(names)}", "remove `--layout`")
        for what, names in faults.items()
        if names
    ]
    if not translated.tensors:
        what = f"no tensor of `{component}` has a name in the layout `{choices.layout}`"
        problems.append(Problem(what, "remove `--layout`"))
    return problems


def _translation_notes(component: str, translated: Translated) -> Iterator[str]:
    left = {"without a name in the layout": translated.unknown, "aliases of other tensors": translated.unneeded}
    return (f"skipped in {component}, {what}: {counted(names)}" for what, names in left.items() if names)


def _in_folder(
    part: Part,
    family: FamilyFacts,
    facts: ComponentFacts,
    tensors: Mapping[str, RowSpans],
    config: Path | None,
    notes: list[str],
) -> Part:
    """Return a part as a folder with its config.json."""
    from diffsynth_core.conversion.pretrained import plan_folder  # imports torch

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        folder = plan_folder(family, facts, part.component, shapes, config)
    except DiffSynthError as error:
        report(*error.problems)
        return part
    if config is None:
        notes.append(
            f"config.json of {part.component} is inferred from shapes, which do not tell all, such as the size of "
            "heads; pass that of the base model with `--config`"
        )
    return replace(part, stem=f"{folder.name}/{folder.stem}", config=folder.config, prefix=None)


def _in_dtype(
    component: str, tensors: Mapping[str, RowSpans], dtype: SplitDtype, notes: list[str]
) -> tuple[OutputTensor, ...]:
    """Return tensors in a dtype; none if a problem was reported."""
    rounded = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8]
    if rounded:
        report(Problem(f"`{component}` is in 8-bit floats already: {counted(rounded)}", "remove `--dtype`"))
        return ()
    if dtype == "fp8_scaled" and tensors:
        layers = rounded_layers(tensors)
        if not layers:
            report(
                Problem(f"`{component}` has no blocks with linear layers to store in 8-bit floats", "remove `--dtype`")
            )
            return ()
        notes.append(
            f"{pluralize(len(layers), 'layer')} of {component} in 8-bit floats: each weight is off by at most 1/16 of "
            "itself, or 1/400000 of the largest of its layer if that is more"
        )
    return recast(tensors, dtype)
