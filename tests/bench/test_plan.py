"""How long the plan of a recipe takes."""

import os
import subprocess
import sys
import time

import pytest
import torch

from diffsynth_cli.text.estimate import estimate_lines, make_estimate
from diffsynth_cli.text.plan import parameter_lines, plan_lines
from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter


def plan_recipe(recipe: str) -> None:
    """Plan a recipe for a GPU that everything is tried for."""
    for resolved in resolve_stages({"recipe": recipe, "dry_run": True, "gpu_memory": "8GB"}, ()):
        plan = make_plan(resolved, SilentReporter(), without_files=True)
        estimated = estimate_lines(plan, make_estimate(plan))
        assert [*plan_lines(plan, SilentReporter()), *parameter_lines(plan), *estimated]


def test_every_plan_takes_less_than_two_seconds_once_its_memory_was_measured(
    tmp_path, monkeypatch: pytest.MonkeyPatch, bench
):
    """On a machine that holds neither models nor a dataset."""
    assert torch.__version__  # what planning asks for the devices there are is imported by now
    monkeypatch.chdir(tmp_path)
    seconds = {}
    for recipe in bench.size(recipe_names(), recipe_names()[:2]):
        plan_recipe(recipe)
        started = time.perf_counter()
        plan_recipe(recipe)
        seconds[recipe] = time.perf_counter() - started
    slowest = max(seconds, key=seconds.__getitem__)
    bench.at_most(f"seconds of the slowest of {len(seconds)} plans", seconds[slowest], 2, slowest)


@pytest.mark.long
@pytest.mark.long
def test_a_dry_run_takes_little_longer_than_its_imports(tmp_path, bench):
    """The first measures activations, the second remembers them."""

    def seconds(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True, capture_output=True, env=environment)
        return time.perf_counter() - started

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "DIFFSYNTH_SKIP_DOWNLOAD": "0"}
    imports = seconds("-c", "import torch, diffusers")
    dry_run = ("-m", "diffsynth_cli", "train", "--recipe", "qwen-image-lora", "--dry_run")
    bench.at_most("a first dry run over importing torch and diffusers", seconds(*dry_run) / imports, 2.5)
    bench.at_most("a second one", seconds(*dry_run) / imports, 1.5)
