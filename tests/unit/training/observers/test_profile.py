"""How the time of traced steps is shared out."""

import pytest
import torch

from diffsynth_core.training.observers.observer import StepReport
from diffsynth_core.training.observers.profile import limit_in_words, step_shares

GPU = torch.device("cuda")


def reports(*seconds: tuple[float, float]) -> list[StepReport]:
    return [StepReport(step, 0, step, 0.0, 0.0, 0.0, *each) for step, each in enumerate(seconds, start=3)]


def event(category: str, start: float, duration: float) -> dict[str, object]:
    """Times in milliseconds; a trace has them in microseconds."""
    return {"cat": category, "ts": 1e3 * start, "dur": 1e3 * duration, "name": "an event"}


def test_the_time_of_a_gpu_is_that_of_kernels_of_copies_beside_none_and_of_waiting():
    """Two steps of 50 ms, 10 ms of them for data; kernels of two streams overlap, and so does half of a copy."""
    events = [event("kernel", 10, 40), event("kernel", 30, 30), event("gpu_memcpy", 50, 20), event("kernel", 80, 5)]
    events += [event("cpu_op", 0, 100), event("gpu_user_annotation", 0, 100), {"ph": "M", "name": "process_name"}]
    shares = step_shares(reports((0.05, 0.004), (0.05, 0.006)), events, GPU)
    assert shares == pytest.approx({"data": 0.1, "kernels": 0.55, "copies": 0.1, "host": 0.25})


def test_what_runs_while_the_host_waits_for_data_is_counted_once():
    shares = step_shares(reports((0.1, 0.05)), [event("kernel", 0, 80)], GPU)
    assert shares == pytest.approx({"data": 0.2, "kernels": 0.8, "copies": 0, "host": 0})


@pytest.mark.parametrize(("data_seconds", "limit"), [(0.02, "computation"), (0.07, "data")])
def test_a_cpu_computes_or_waits_for_data(data_seconds, limit):
    known = reports((0.1, data_seconds))
    shares = step_shares(known, [event("kernel", 0, 80)], torch.device("cpu"))
    assert shares == pytest.approx({"data": 10 * data_seconds, "computation": 1 - 10 * data_seconds})
    assert limit_in_words(known, shares).startswith(f"the limit is {limit}: of 0.1 s a step, traced, waiting for data")
