"""What a checkpoint of a run holds, under which names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.lora import lora_weights, name_lora
from diffsynth_core.checkpoints.run_folder import CheckpointEntry
from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.families.loading import stored_dtypes
from diffsynth_core.planning.plan import Plan
from diffsynth_core.training.model import TrainingModule

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Number formats by their name in safetensors."""


def checkpoint_tensors(plan: Plan, model: TrainingModule) -> dict[str, Tensor]:
    """Everything a checkpoint holds, under its documented names.

    Full weights: `pipe.<component>.<parameter>` for every parameter of the component, in the number format of its base
    file. LoRA: the same with LoRA endings, or the names of another dialect, in float32. `save_dtype` overrides both;
    `remove_prefix_in_ckpt` is taken off the keys that start with it.
    """
    tensors: dict[str, Tensor] = {}
    for component, module in model.components.items():
        if component in plan.training.full:
            tensors.update(_full_tensors(plan, component, module))
        if component == plan.training.lora_component:
            tensors.update(_lora_tensors(plan, component, module))
    return tensors


def _full_tensors(plan: Plan, component: str, module: nn.Module) -> dict[str, Tensor]:
    translate = plan.facts.component(component).module_key
    stored = {translate(name): dtype for name, dtype in stored_dtypes(plan.components[component]).items()}
    prefix = plan.parameters.remove_prefix_in_ckpt
    tensors = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        dtype = (
            getattr(torch, plan.parameters.save_dtype)
            if plan.parameters.save_dtype
            else TORCH_DTYPES.get(stored[plain], tensor.dtype)
        )
        tensors[f"pipe.{component}.{plain}".removeprefix(prefix)] = tensor.to(dtype)
    return tensors


def _lora_tensors(plan: Plan, component: str, module: nn.Module) -> dict[str, Tensor]:
    dtype = getattr(torch, plan.parameters.save_dtype or "float32")
    dialect = plan.parameters.lora_format
    named = {name: tensor.to(dtype) for name, tensor in name_lora(lora_weights(module), dialect).items()}
    if dialect != "diffsynth":
        return named
    prefix = plan.parameters.remove_prefix_in_ckpt
    return {f"pipe.{component}.{name}".removeprefix(prefix): tensor for name, tensor in named.items()}


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
    digest = write_tensors(path, checkpoint_tensors(plan, model), checkpoint_metadata(plan))
    return CheckpointEntry(path.name, step, epoch, digest, path.stat().st_size)
