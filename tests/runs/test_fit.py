"""Runs that `fit` changed: recorded with what they were trained with, and resumed with it, however it is asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.memory.fit_options import FITTED
from diffsynth_core.planning.memory.fitting import find_fit
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.session import Session

FILES = ("epoch-0.safetensors", "state/step-4/optimizer.safetensors", "state/step-4/trained.safetensors")


@pytest.fixture
def given(tiny_models: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    monkeypatch.chdir(tmp_path)
    return {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 4, "lora_rank": 4,
            "mixed_precision": "bf16", "dataset_num_workers": 0}  # fmt: skip


@pytest.fixture
def memory(given: Mapping[str, Any], tiny_models: Path) -> str:
    """As little as the run fits in with all that `fit` may do."""
    plan = make_plan(resolve(given), SilentReporter(), base=tiny_models)
    run = find_workload(plan)
    fit = find_fit(plan, memory_config(plan, run.largest), 0)
    least = next(one.peak for one in reversed(fit.tried) if {change.parameter for change in one.changes} <= {*FITTED})
    return f"{least / 2**20 + 0.001:.3f}MB"


def train(given: Mapping[str, Any], folder: str, **flags: object) -> Path:
    (result,) = Session.of(**given, output_path=folder, **flags).train()
    return result.folder


def test_a_run_that_was_changed_is_recorded_and_resumed_with_the_changes(given, memory):
    through = train(given, "through", fit=True, gpu_memory=memory)
    recorded = json.loads((through / "run.json").read_text())["parameters"]
    usual = json.loads((train(given, "usual") / "run.json").read_text())["parameters"]
    changed = {name: recorded[name] for name in FITTED if recorded[name] != usual[name]}
    assert changed.keys() >= {"use_gradient_checkpointing_offload", "optimizer"}, changed
    assert all(recorded[name] == usual[name] for name in ("batch_size", "lora_rank", "max_pixels"))

    half = {**given, "max_steps": 2}
    for folder, again in {
        "with fit": {"fit": True, "gpu_memory": memory},
        "with room for more": {"fit": True, "gpu_memory": "80GB"},
        "by hand": changed,
    }.items():
        train(half, folder, fit=True, gpu_memory=memory)
        pieces = train(given, folder, resume="auto", **again)
        assert all((through / file).read_bytes() == (pieces / file).read_bytes() for file in FILES), folder
