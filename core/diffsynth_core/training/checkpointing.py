"""What a checkpoint of a run holds, under which names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.lora import lora_weights, name_lora
from diffsynth_core.checkpoints.run_folder import CheckpointEntry
from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.planning.plan import Plan
from diffsynth_core.state_dicts.writing import DTYPE_NAMES
from diffsynth_core.training.model import TrainingModule

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class CheckpointContent:
    """Tensors of a checkpoint by their keys, and the number formats they are written in."""

    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]


def checkpoint_content(plan: Plan, model: TrainingModule) -> CheckpointContent:
    """Everything a checkpoint holds.

    Full weights: `pipe.<component>.<parameter>` for every parameter of the component, in the number format of its base
    file. LoRA: the same with LoRA endings, or the names of another dialect, in float32. `save_dtype` overrides both;
    `remove_prefix_in_ckpt` is taken off the keys that start with it.
    """
    tensors: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for component, module in model.components.items():
        if component in plan.training.full:
            stored = model.stored_dtypes[component]
            for name, (tensor, own_names) in _full_weights(plan, component, module, stored).items():
                key = _key(plan, component, name)
                tensors[key] = tensor
                dtypes[key] = TORCH_DTYPES[stored[own_names[0]]]
        if component == plan.training.lora_component:
            tensors |= _lora_tensors(plan, component, module)
    if plan.parameters.save_dtype:
        dtypes = dict.fromkeys(tensors, getattr(torch, plan.parameters.save_dtype))
    return CheckpointContent(tensors, dtypes)


def _key(plan: Plan, component: str, name: str) -> str:
    """The key of a tensor, given its name in checkpoints."""
    return f"pipe.{component}.{name}".removeprefix(plan.parameters.remove_prefix_in_ckpt)


def _full_weights(
    plan: Plan, component: str, module: nn.Module, stored: Mapping[str, str]
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """A component's own tensors by their names in checkpoints, without peft's layers; with each, its names here.

    What the base file lacks is left out: it is another name of a tensor that the file has (tied embeddings).
    """
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in module.state_dict().items()}
    own = {name: tensor for name, tensor in tensors.items() if name in stored}
    names = plan.components[component].layout.in_checkpoints
    return {name: (names.join(name, own), names.ours(name) or ()) for name in names.theirs_of(own)}


def _lora_tensors(plan: Plan, component: str, module: nn.Module) -> dict[str, Tensor]:
    dialect, naming = plan.parameters.lora_format, plan.facts.component(component).lora_naming
    named = name_lora(lora_weights(module, plan.components[component].layout.documented), dialect, naming)
    if dialect != "diffsynth":
        return named
    return {_key(plan, component, name): tensor for name, tensor in named.items()}


def checkpoint_metadata(plan: Plan) -> Mapping[str, str]:
    """What a checkpoint says of itself, for the tools that take it apart."""
    metadata = {"family": plan.facts.name, "removed_prefix": plan.parameters.remove_prefix_in_ckpt}
    if plan.training.lora_component:
        metadata |= {"lora_component": plan.training.lora_component, "lora_format": plan.parameters.lora_format}
    return metadata


def write_checkpoint(
    plan: Plan, model: TrainingModule, folder: Path, name: str, step: int, epoch: int
) -> CheckpointEntry:
    """Write `<name>.safetensors`, whole or not at all."""
    path = folder / f"{name}.safetensors"
    content = checkpoint_content(plan, model)
    digest = write_tensors(path, content.tensors, checkpoint_metadata(plan), content.dtypes)
    return CheckpointEntry(path.name, step, epoch, digest, path.stat().st_size)
