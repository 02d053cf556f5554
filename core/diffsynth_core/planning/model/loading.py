"""Components of a model plan: their files, and the preset LoRA merged into the weights of one of them."""

import gc
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.deltas import open_deltas
from diffsynth_core.adapters.merge import MAX_SILENT_ERROR, RelativeError, Workspace, merge_rows
from diffsynth_core.adapters.tensors import Place, place
from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import WeightChange, load_component
from diffsynth_core.models.packed_weights import PackedWeights
from diffsynth_core.models.prepare import FROZEN, ComponentSetup
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import Reporter


def load_planned(
    model: ModelPlan,
    family: Family,
    component: str,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    *,
    change: WeightChange | None = None,
    float32: Collection[str] = (),
    setup: ComponentSetup = FROZEN,
    place: Place = place,
    packed: PackedWeights | None = None,
) -> nn.Module:
    """Return a component in `dtype` on `device`, in eval mode; see `load_component`.

    If the preset LoRA is for this component, it is merged.

    Args:
        change: applied to each tensor after the preset LoRA.
        packed: of a component that nothing is merged into; see `load_component`.

    Raises:
        FaultsFound: as `load_component`.
    """
    with _merged_lora(model, component, dtype, reporter) as merged:
        return load_component(
            family,
            model.components[component],
            dtype,
            device,
            reporter,
            change=_both(merged, change),
            float32=float32,
            setup=setup,
            place=place,
            packed=packed,
        )


def _both(first: WeightChange | None, second: WeightChange | None) -> WeightChange | None:
    if first is None or second is None:
        return first or second

    def change(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        return second(name, first(name, value, torch.float32), dtype)

    return change


@contextmanager
def _merged_lora(
    model: ModelPlan, component: str, dtype: torch.dtype, reporter: Reporter
) -> Iterator[WeightChange | None]:
    """Yield what merges the preset LoRA into the weights of a component; None if it is not for this component."""
    fused_lora, files = model.fused_lora, model.components[component]
    if fused_lora is None or fused_lora.component != component:
        yield None
        return
    error = RelativeError()
    with open_deltas(fused_lora.file, fused_lora.shapes, files.layout.public_keys) as deltas:

        def merged(name: str, value: Tensor, kept: torch.dtype) -> Tensor:
            delta = deltas.of(name)
            if delta is None:
                return value
            result, squared = merge_rows(value.reshape(value.shape[0], -1), delta, kept, Workspace())
            error.add(RelativeError(squared, delta.squared_norm))
            return result.reshape(value.shape)

        yield merged
    reporter.info(f"Preset LoRA `{fused_lora.file.path}` merged into {fused_lora.changes} of {component}")
    if error.value > MAX_SILENT_ERROR:
        reporter.warn(
            f"rounding to {str(dtype).removeprefix('torch.')} loses {error.value:.0%} of the change of {component} by "
            "the preset LoRA; `--mixed_precision no` preserves it"
        )


def drop(components: dict[str, Any], device: torch.device) -> None:
    """Remove components that are needed no more, and release their memory on the device."""
    modules = [each for each in components.values() if isinstance(each, nn.Module)]
    tensors = [weakref.ref(tensor) for each in modules for tensor in (*each.parameters(), *each.buffers())]
    components.clear()
    modules.clear()
    # Most are gone by now, and to search all objects for cycles takes a third of a second.
    if any(tensor() is not None for tensor in tensors):
        free_device_memory(device)
    elif device.type != "cpu":
        torch.accelerator.empty_cache()  # type: ignore[no-untyped-call, unused-ignore]


def free_device_memory(device: torch.device) -> None:
    """Release the memory of deleted modules on the device."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()  # type: ignore[no-untyped-call, unused-ignore]
