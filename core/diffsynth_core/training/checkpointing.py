"""The tensors and keys of checkpoints."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.lora import lora_weights, name_lora
from diffsynth_core.adapters.tensors import Whole, as_is
from diffsynth_core.checkpoints.keys import strip_controlnet_index
from diffsynth_core.checkpoints.run_folder import AVERAGE_SUFFIX, CheckpointEntry, SavedFile
from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.training.model import TrainingModule
from diffsynth_core.training.modelspec import modelspec
from diffsynth_core.weights.dtypes import torch_dtype
from diffsynth_core.weights.writing import LazyStateDict


@dataclass(frozen=True)
class CheckpointContent:
    """Tensors of a checkpoint by key, and the dtypes to write them in."""

    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]


def checkpoint_content(plan: RunPlan, model: TrainingModule, whole: Whole = as_is) -> CheckpointContent:
    """Return the content of a checkpoint.

    Full weights: `pipe.<component>.<parameter>` for all parameters of components that train in full, and for those of
    the trained modules of other components, in the dtype of the base file. LoRA: the same with the suffixes of LoRA
    keys, or the keys of another format, in float32. `save_dtype` overrides both dtypes; `remove_prefix_in_ckpt` is
    removed from keys that start with it.

    Args:
        whole: applied to a tensor of the model at each access; to those of a LoRA now.
    """
    makers: dict[str, Callable[[], Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for component, module in model.components.items():
        names, own = (
            plan.model.components[component].layout.checkpoint_keys,
            _trained_tensors(plan, model, component, whole),
        )
        stored = model.stored_dtypes[component]
        for name in names.to_sources(own):
            key = _key(plan, component, name)
            makers[key] = partial(names.fuse, name, own)
            dtypes[key] = torch_dtype(stored[(names.to_targets(name) or ())[0]])
        if component == plan.training.lora_component:
            lora = _lora_tensors(plan, component, module, whole)
            makers |= {key: partial(lora.__getitem__, key) for key in lora}
    if plan.parameters.save_dtype:
        dtypes = dict.fromkeys(makers, getattr(torch, plan.parameters.save_dtype))
    return CheckpointContent(LazyStateDict(makers), dtypes)


def _key(plan: RunPlan, component: str, name: str) -> str:
    """Return the checkpoint key of a tensor."""
    return f"pipe.{component}.{name}".removeprefix(removed_prefix(plan.parameters))


def removed_prefix(parameters: Parameters) -> str:
    """Return the prefix that is removed from keys."""
    return strip_controlnet_index(parameters.remove_prefix_in_ckpt)


def _trained_tensors(plan: RunPlan, model: TrainingModule, component: str, whole: Whole) -> Mapping[str, Tensor]:
    """Return the tensors of a component that train without LoRA, by parameter name without the wrapper modules of
    peft.

    Tensors that the base file lacks are omitted: they are aliases of others (tied embeddings).
    """
    state = model.components[component].state_dict(keep_vars=True)
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    stored = [name for name in tensors if name in model.stored_dtypes[component]]
    kept = plan.training.weights(component, plan.model.components[component].layout, stored)
    return LazyStateDict({name: partial(whole, tensors[name]) for name in stored if name in kept})


def _lora_tensors(plan: RunPlan, component: str, module: nn.Module, whole: Whole) -> dict[str, Tensor]:
    lora_format, naming = plan.parameters.lora_format, plan.model.facts.component(component).lora_naming
    weights = lora_weights(module, plan.model.components[component].layout.public_keys, whole)
    named = name_lora(weights, lora_format, naming)
    if lora_format != "diffsynth":
        return named
    return {_key(plan, component, name): tensor for name, tensor in named.items()}


def checkpoint_metadata(plan: RunPlan, step: int, averaged: bool) -> Mapping[str, str]:
    """Return the metadata of a checkpoint: what the conversion commands read, and what others know."""
    metadata = {"family": plan.model.facts.name, "removed_prefix": removed_prefix(plan.parameters)}
    if plan.training.lora_component:
        metadata |= {"lora_component": plan.training.lora_component, "lora_format": plan.parameters.lora_format}
    return {**metadata, **modelspec(plan, step, averaged)}


def conversion_hint(plan: RunPlan, path: Path) -> str | None:
    """Return the command that converts a checkpoint of the denoiser to the keys that ComfyUI detects, if it needs
    one.
    """
    denoiser = plan.model.facts.denoiser
    if denoiser not in plan.training.full:
        return None
    published = plan.model.facts.component(denoiser).published.get("original")
    if published in (None, plan.model.components[denoiser].layout.checkpoint_keys):
        return None
    output = path.with_name(f"{path.stem}-original")
    return f"diffsynth split-ckpt {shlex.quote(str(path))} --layout original --output_path {shlex.quote(str(output))}"


def write_checkpoint(
    plan: RunPlan,
    content: CheckpointContent,
    folder: Path,
    name: str,
    step: int,
    epoch: int,
    average: CheckpointContent | None = None,
) -> CheckpointEntry:
    """Write `<name>.safetensors` atomically, and the averages of the weights, if there are some, beside it."""
    saved = _write(content, folder / f"{name}.safetensors", checkpoint_metadata(plan, step, averaged=False))
    averages = None
    if average:
        metadata = checkpoint_metadata(plan, step, averaged=True)
        averages = _write(average, folder / f"{name}{AVERAGE_SUFFIX}.safetensors", metadata)
    return CheckpointEntry(saved.file, step, epoch, saved.sha256, saved.bytes, average=averages)


def _write(content: CheckpointContent, path: Path, metadata: Mapping[str, str]) -> SavedFile:
    digest = write_tensors(path, content.tensors, metadata, content.dtypes)
    return SavedFile(path.name, digest, path.stat().st_size)
