"""Components as a run starts from them."""

import torch
from torch import nn

from diffsynth_core.adapters.tensors import Place, place
from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import module_shapes
from diffsynth_core.models.prepare import FROZEN, ComponentSetup
from diffsynth_core.planning.model.loading import load_planned
from diffsynth_core.planning.model.packed import packed_weights
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
    """Return a component in `dtype`, or float32 where it trains in that, on `device`, in eval mode; see `load_planned`.

    Weights that its store packs are read from the cache if an earlier start has packed them.

    Raises:
        FaultsFound: as `load_component`.
    """
    files = plan.model.components[component]
    float32 = plan.training.float32_weights(component, files.layout, module_shapes(files))
    with packed_weights(plan, component, reporter) as packed:
        return load_planned(
            plan.model,
            family,
            component,
            dtype,
            device,
            reporter,
            float32=float32,
            setup=setup,
            place=place,
            packed=packed,
        )
