"""Components as folders that `from_pretrained` of diffusers and transformers opens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.conversion.key_owners import record_of
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.model_files import expand_entry
from diffsynth_core.models.configs import config_beside
from diffsynth_core.models.loading import build_empty
from diffsynth_core.models.recognition import SECOND_NAMES, recognize_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, FamilyFacts, Shapes
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.base_files import read_parts
from diffsynth_core.weights.weight_sets import WeightSet

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library -> names of weight files in a folder, without their ending."""
SECOND_FOLDER = "transformer_2"
"""Folder of the second of two transformers."""


@dataclass(frozen=True)
class PretrainedFolder:
    """What a folder is called, and what is in it: weight files of a stem, and a config.json."""

    name: str
    stem: str
    config: str


def plan_folder(
    family: FamilyFacts, facts: ComponentFacts, component: str, shapes: Shapes, config: Path | None
) -> PretrainedFolder:
    """Plan the folder of a component.

    Args:
        facts: of the component, or of the one of the same kind.
        shapes: of its tensors, by module key.
        config: its config.json; None: it is inferred from the shapes.

    Raises:
        FaultsFound: if tensors are missing or do not belong to the component of this configuration.
    """
    files = ComponentFiles(facts.name, component, (), config)
    try:
        module = build_empty(load_family(family.name), files, shapes)
    except DiffSynthError:
        raise
    except Exception as error:  # whatever a library raises for a config that it cannot build
        raise DiffSynthError(_unbuilt(component, config, error), "pass its config.json with `--config`") from error
    raise_if_any(_differences(module, component, shapes, config))
    in_transformers = not hasattr(module, "to_json_string")
    stem = STEMS["transformers" if in_transformers else "diffusers"]
    folder = SECOND_FOLDER if component in SECOND_NAMES else facts.folder or component
    return PretrainedFolder(folder, stem, _config_text(module, in_transformers))


def configs_of_run(weights: WeightSet, family: FamilyFacts) -> dict[str, Path]:
    """Return the config.json of each component of the run that wrote a checkpoint, where they are still on disk."""
    record = record_of(weights)
    if record is None or record.parameters.get("rehearse"):
        return {}
    found: dict[str, Path] = {}
    for entry in _entries(record.parameters):
        paths = expand_entry(entry, model_base_path())
        for part in read_parts(paths) if paths else ():
            known = recognize_component(part.tensors, family)
            config = config_beside(part.paths[0], known[1], family) if known else None
            if known and config:
                found.setdefault(known[1].name, config)
    return found


def _entries(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the model parameters of a record name."""
    for group in parameters.get("model_paths") or ():
        yield from [group] if isinstance(group, str) else group
    yield from parameters.get("model_id_with_origin_paths") or ()


def _unbuilt(component: str, config: Path | None, error: Exception) -> str:
    if config is None:
        return f"the tensor shapes of `{component}` match no known configuration"
    return f"`{component}` cannot be built from `{config}`: {' '.join(str(error).split()) or type(error).__name__}"


def _differences(module: Any, component: str, shapes: Shapes, config: Path | None) -> list[Problem]:
    """Return what keeps `from_pretrained` from loading these tensors, and no others, into a module."""
    expected: Mapping[str, Any] = module.state_dict()
    required = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    source = f"`{config}`" if config else "the config inferred from its shapes"
    missing = sorted((expected.keys() & required) - shapes.keys())
    surplus = sorted(shapes.keys() - expected.keys())
    wrong = sorted(key for key in shapes.keys() & expected.keys() if tuple(expected[key].shape) != shapes[key])
    found = {
        f"is missing {{}} that {source} requires": missing,
        f"has {{}} that {source} does not define": surplus,
        f"has {{}} of another shape than {source} requires": wrong,
    }
    return [
        Problem(
            f"`{component}` {what.format(pluralize(len(keys), 'tensor'))}: {list_names(keys)}",
            "pass the config.json of its base model with `--config`, or choose `--layout diffusers`",
        )
        for what, keys in found.items()
        if keys
    ]


def _config_text(module: Any, in_transformers: bool) -> str:
    """Return the config.json of a module, as its library writes it."""
    if not in_transformers:
        return str(module.to_json_string())
    module.config.architectures = [type(module).__name__]
    return str(module.config.to_json_string(use_diff=False))
