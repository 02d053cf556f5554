"""Some steps of a run are traced; its weights are those without."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from diffsynth_core.training.observers.observer import Observer, StepReport
from tests.naming import names


class Said(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


class Watch(Observer):
    """Whether the profiler was on, step by step."""

    def __init__(self) -> None:
        self.traced: list[bool] = []

    def on_step(self, report: StepReport) -> None:
        self.traced.append(torch.autograd._profiler_enabled())


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., RunPlan]:
    def plan(folder: str, **flags: object) -> RunPlan:
        given = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 6, "lora_rank": 2,
                 "device": "cpu", "dataset_num_workers": 0, "output_path": str(tmp_path / folder)}  # fmt: skip
        return make_plan(resolve(given | flags), SilentReporter(), base=tiny_models)

    return plan


def steps_in(path: Path) -> int:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "cpu_op" for event in events)
    return sum(event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep#") for event in events)


def test_steps_are_traced_and_the_run_is_as_without(plan):
    said, watch = Said(), Watch()
    plain = train(plan("plain"), SilentReporter(), StopRequest()).folder
    traced = train(plan("traced", profile=2), said, StopRequest(), observers=[watch]).folder
    assert watch.traced == [False, False, True, True, False, False]
    (found,) = traced.glob("*profile*")
    assert found.name == "profile-steps-3-4.json.gz" and steps_in(found) == 2
    (line,) = [line for line in said.lines if line.startswith("Traced")]
    assert line == names("Traced steps in", "ui.perfetto.dev", "the limit is", "waiting for data", "computation")
    for name in ("epoch-0.safetensors", "state/step-6/optimizer.safetensors"):
        assert (plain / name).read_bytes() == (traced / name).read_bytes()


def test_a_run_that_ends_earlier_has_traced_what_it_did(plan):
    said = Said()
    early = train(plan("early", profile=4), said, StopRequest(), stop_after=3).folder
    assert steps_in(early / "profile-steps-3-3.json.gz") == 2, "the next one has begun"
    train(plan("none", profile=4), said, StopRequest(), stop_after=1)
    assert said.lines.count("The run ended before a step was traced") == 1
    resumed = train(plan("early", profile=1, resume="auto"), said, StopRequest()).folder
    assert steps_in(resumed / "profile-steps-6-6.json.gz") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"profile": 5}, "needs 7 steps, with 2 that warm up, but the run has 6 steps to take"),
        ({"profile": 2, "probe": 3}, "`profile` writes a trace into the folder of the run, but `probe` writes none"),
        ({"profile": 2, "task": "sft:data_process"}, "`task` `sft:data_process` has no steps to `profile`"),
    ],
)
def test_what_cannot_be_traced_is_told_at_once(plan, flags, message):
    with pytest.raises(DiffSynthError) as raised:
        plan("wrong", **flags)
    assert len(raised.value.problems) == 1 and message in raised.value.problems[0].message
    assert raised.value.problems[0].wrong_use
