"""A run says when it ends and what it costs, and how long it has taken."""

import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.memory.disk import SaveSeconds
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers.forecast import ForecastObserver
from diffsynth_core.training.observers.observer import StepReport
from diffsynth_core.training.pace import Pace

COMMON = ("train", "--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--resume", "auto")


def test_a_run_says_when_it_ends_and_what_it_costs(cli, photographs):
    flags = (*COMMON, "--dataset_base_path", photographs, "--output_path", "out", "--price_per_hour", 3600)
    outcome = cli(*flags, "--max_steps", 5)
    (told,) = re.findall(r"The run ends about .*", " ".join(outcome.err.split("\n")))
    assert re.match(r"The run ends about \d{4}-\d\d-\d\d \d\d:\d\d, in \d+ s, at [\d.]+ s a step; ", told), told
    (costs,) = re.findall(r"costs about (\d+\.\d\d)", told)
    seconds = json.loads(Path("out/run.json").read_text())["seconds"]
    (taken,) = re.findall(r"The run has taken .* and cost (\d+\.\d\d)", outcome.err)
    assert abs(float(taken) - seconds) < 0.01, "a second costs 1"
    assert 0 < float(costs) < 2 * seconds + 2, "with a save that is assumed to take a second"

    resumed = cli(*flags, "--max_steps", 6)
    assert resumed.code == 0 and "The run ends about" not in resumed.err, "too few steps to know"
    (taken,) = re.findall(r"The run has taken .* and cost (\d+\.\d\d)", resumed.err)
    assert float(taken) > seconds, "all commands of the run are paid for"


class Told(SilentReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def plan(tiny_models, photographs, tmp_path, monkeypatch):
    """The plan of 100 steps with 4 checkpoints, the last after 100, and a state after each 10."""
    monkeypatch.chdir(tmp_path)

    def plan(**more: object) -> RunPlan:
        flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 100, "device": "cpu",
                 "save_steps": 30, "save_state_steps": 10, "output_path": "out", **more}  # fmt: skip
        return make_plan(resolve(flags), SilentReporter(), base=tiny_models)

    return plan


def follow(plan: RunPlan, stop: StopRequest, steps: list[float]) -> list[str]:
    """What is told after steps that took so many seconds, of a run that took an hour before."""
    told = Told()
    observer = ForecastObserver(plan, Pace(SaveSeconds(checkpoint=60, state=6)), stop, told, seconds_before=3600)
    for number, seconds in enumerate(steps, 1):
        observer.on_step(StepReport(number, 0, number, 0.0, 0.0, 0.0, seconds, 0.0))
    return told.messages


def test_the_first_step_does_not_count_and_saves_do(plan):
    (told,) = follow(plan(price_per_hour=10), StopRequest(), [500, 10, 20, 30, 7, 7])
    left = 96 * 20 + 4 * 60 + 10 * 6
    end = datetime.now().astimezone() + timedelta(seconds=left)
    assert told.partition(",")[0] in (
        f"The run ends about {moment:%Y-%m-%d %H:%M}" for moment in (end, end - timedelta(minutes=1))
    )
    assert told.partition(", ")[2] == "in 37 min, at 20 s a step; the whole run costs about 16.17"


def test_nothing_is_told_of_costs_without_a_price_nor_before_three_steps_are_measured(plan):
    assert follow(plan(), StopRequest(), [1, 1, 1]) == []
    (told,) = follow(plan(), StopRequest(), [1, 1, 1, 1])
    assert told.endswith(", in 7 min, at 1 s a step")


def test_a_run_that_max_time_will_stop_says_so(plan):
    stop = StopRequest()
    stop.limit_time(200)
    (told,) = follow(plan(), stop, [1, 1, 1, 1])
    assert told.endswith("; `--max_time` stops it in 3 min at the latest")
