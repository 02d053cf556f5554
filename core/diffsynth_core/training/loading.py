"""Components as a run starts from them: their files, and the preset LoRA merged into the weights of one of them."""

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.deltas import open_deltas
from diffsynth_core.adapters.merge import MAX_SILENT_ERROR, RelativeError, Workspace, merge_rows
from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import load_component, module_shapes
from diffsynth_core.planning.model_plan import FusedLora
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter


def load_for_run(
    plan: RunPlan, family: Family, component: str, dtype: torch.dtype, device: torch.device, reporter: Reporter
) -> nn.Module:
    """A component in `dtype`, or float32 where it trains, on `device`, frozen and in eval mode.

    The preset LoRA is merged where it is for it.

    Raises:
        FaultsFound: as `load_component`.
    """
    if plan.model.fused_lora is None or plan.model.fused_lora.component != component:
        fp32_params = _fp32_params(plan, component)
        return load_component(family, plan.model.components[component], dtype, device, reporter, float32=fp32_params)
    return _load_merged(plan, plan.model.fused_lora, family, dtype, device, reporter)


def _fp32_params(plan: RunPlan, component: str) -> frozenset[str]:
    """The weights that train: in fewer bits most steps would not move them."""
    files = plan.model.components[component]
    return plan.training.weights(component, files.layout, module_shapes(files))


def _load_merged(
    plan: RunPlan, fused_lora: FusedLora, family: Family, dtype: torch.dtype, device: torch.device, reporter: Reporter
) -> nn.Module:
    files = plan.model.components[fused_lora.component]
    error = RelativeError()
    with open_deltas(fused_lora.file, fused_lora.shapes, files.layout.public_keys) as deltas:

        def merged(name: str, value: Tensor, kept: torch.dtype) -> Tensor:
            delta = deltas.of(name)
            if delta is None:
                return value
            result, squared = merge_rows(value.reshape(value.shape[0], -1), delta, kept, Workspace())
            error.add(RelativeError(squared, delta.squared_norm))
            return result.reshape(value.shape)

        fp32_params = _fp32_params(plan, fused_lora.component)
        module = load_component(family, files, dtype, device, reporter, merged, fp32_params)
    reporter.info(f"Preset LoRA `{fused_lora.file.path}` merged into {fused_lora.changes} of {files.component}")
    if error.value > MAX_SILENT_ERROR:
        reporter.warn(
            f"rounding to {str(dtype).removeprefix('torch.')} loses {error.value:.0%} of the change of {files.component} by the "
            f"preset LoRA; `--mixed_precision no` preserves it"
        )
    return module
