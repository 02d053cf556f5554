"""Components as a run starts from them: their files, and the preset LoRA merged into the weights of one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.deltas import open_deltas
from diffsynth_core.adapters.merge import MAX_SILENT_ERROR, RelativeError, Workspace, merge_rows
from diffsynth_core.adapters.tensors import Place, place
from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import WeightChange, load_component, module_shapes
from diffsynth_core.models.prepare import FROZEN, ComponentSetup
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter


def load_for_run(
    plan: RunPlan,
    family: Family,
    component: str,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    setup: ComponentSetup = FROZEN,
    place: Place = place,
) -> nn.Module:
    """Return a component in `dtype`, or float32 where it trains, on `device`, in eval mode; see `load_component`.

    If the preset LoRA is for this component, it is merged.

    Raises:
        FaultsFound: as `load_component`.
    """
    files = plan.model.components[component]
    # The weights that train: in fewer bits most steps would not move them.
    float32 = plan.training.weights(component, files.layout, module_shapes(files))
    with _merged_lora(plan, component, dtype, reporter) as change:
        return load_component(
            family, files, dtype, device, reporter, change=change, float32=float32, setup=setup, place=place
        )


@contextmanager
def _merged_lora(
    plan: RunPlan, component: str, dtype: torch.dtype, reporter: Reporter
) -> Iterator[WeightChange | None]:
    """Yield what merges the preset LoRA into the weights of a component; None if it is not for this component."""
    fused_lora, files = plan.model.fused_lora, plan.model.components[component]
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
