"""Time to plan a recipe."""

import time

import pytest
import torch

from diffsynth_cli.text.estimate import estimate_lines, make_estimate
from diffsynth_cli.text.plan import parameter_lines, plan_lines
from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter


def test_every_plan_takes_less_than_two_seconds_without_imports(tmp_path, monkeypatch: pytest.MonkeyPatch, bench):
    """On a machine without models and dataset, for a GPU on which all memory options are tried."""
    assert torch.__version__  # what planning asks for the devices there are is imported by now
    monkeypatch.chdir(tmp_path)
    seconds = {}
    for recipe in bench.size(recipe_names(), recipe_names()[:2]):
        started = time.perf_counter()
        for resolved in resolve_stages({"recipe": recipe, "dry_run": True, "gpu_memory": "8GB"}, ()):
            plan = make_plan(resolved, SilentReporter(), without_files=True)
            estimated = estimate_lines(plan, make_estimate(plan))
            assert [*plan_lines(plan, SilentReporter()), *parameter_lines(plan), *estimated]
        seconds[recipe] = time.perf_counter() - started
    slowest = max(seconds, key=seconds.__getitem__)
    bench.at_most(f"seconds of the slowest of {len(seconds)} plans", seconds[slowest], 2, slowest)
