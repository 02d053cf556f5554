"""Gradient checkpointing in each family: the same gradients, with less memory."""

from collections.abc import Callable

import pytest
from torch.profiler import ProfilerActivity, profile

from tests.covering import covering
from tests.parity.float8_runs import RECIPES, Step, plan_step

KEPT = {"use_gradient_checkpointing": False, "use_gradient_checkpointing_offload": False}
WAYS = {
    "recomputed": KEPT | {"use_gradient_checkpointing": True},
    "recomputed, inputs on the host": KEPT | {"use_gradient_checkpointing_offload": True},
}


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory of a run on the CPU, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("family", "way"), covering([*RECIPES, "qwen-image-edit-2509-lora", "wan2.1-i2v-14b-480p-lora"], WAYS)
)
def test_gradients_are_those_of_kept_activations_and_memory_is_less(family, way, folder):
    kept, recomputed = (Step(plan_step(family, folder, **settings)) for settings in (KEPT, WAYS[way]))
    expected, found = kept.gradients(), recomputed.gradients()
    assert found.keys() == expected.keys() and found
    worst = max(float((found[name] - expected[name]).abs().max()) for name in found)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for step in (kept, recomputed):
        step.model.zero_grad()
    peaks = [peak_bytes(step.gradients) for step in (kept, recomputed)]
    print(f"{family}, {way}: off by {worst:.1e} of {largest:.1e}; peak {peaks[0]:,} -> {peaks[1]:,} bytes")
    assert worst < 1e-6 < largest
    assert peaks[1] < 0.8 * peaks[0]
