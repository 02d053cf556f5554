"""Runs with each optimizer: resumed to the bit, recorded, and as large on disk as planned."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.memory.disk import state_bytes
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.memory.trained_sizes import trained_shapes, trained_tensor_bytes
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from diffsynth_core.weights.headers import read_header

FILES = ("epoch-0.safetensors", "state/step-4/optimizer.safetensors", "state/step-4/trained.safetensors")
FLAGS: dict[str, dict[str, object]] = {
    "adamw": {"optimizer_args": "fused=true"},
    "adamw8bit": {"optimizer_args": {"min_8bit_size": 64, "betas": [0.9, 0.95]}},
    "muon": {"trainable_models": ["dit.transformer_blocks.0.attn.norm_q"]},
    "prodigy": {"learning_rate": 1.0},
}


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., RunPlan]:
    def plan(folder: str, **flags: object) -> RunPlan:
        given = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 4, "lora_rank": 4,
                 "device": "cpu", "dataset_num_workers": 0, "learning_rate": 0.01,
                 "output_path": str(tmp_path / folder)}  # fmt: skip
        return make_plan(resolve(given | flags), SilentReporter(), base=tiny_models)

    return plan


def run(plan: RunPlan) -> Path:
    return train(plan, SilentReporter(), StopRequest()).folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_to_the_bit(plan, name):
    flags = {"optimizer": name, **FLAGS.get(name, {})}
    made = plan("through", **flags)
    through = run(made)
    run(plan("pieces", max_steps=2, **flags))
    pieces = run(plan("pieces", resume="auto", **flags))
    assert all((through / file).read_bytes() == (pieces / file).read_bytes() for file in FILES)

    saved = [entry for entry in read_header(through / FILES[1]).tensors.values() if entry.shape]
    shapes = trained_shapes(made, made.parameters.lora_rank)
    assert sum(entry.nbytes for entry in saved) == made.training.optimizer.state_bytes(shapes)

    record = json.loads((through / "run.json").read_text())
    assert record["parameters"]["optimizer"] == name
    package = OPTIMIZERS[name].package
    assert package is None or package.name in record["versions"]


def test_a_resumed_run_keeps_its_kernel(plan):
    """As on a GPU, whose runs have the fused one by default: it is in no parameter, but in the record."""

    def fused(made: RunPlan) -> RunPlan:
        options = {**made.training.optimizer.options, "fused": True}
        return replace(made, training=replace(made.training, optimizer=OptimizerChoice("adamw", options)))

    through = run(fused(plan("through")))
    run(fused(plan("pieces", max_steps=2)))
    resumed = plan("pieces", resume="auto")
    assert resumed.training.optimizer.fused
    pieces = run(resumed)
    plain = run(plan("plain"))
    assert all((through / file).read_bytes() == (pieces / file).read_bytes() for file in FILES)
    assert [json.loads((folder / "run.json").read_text())["fused_optimizer"] for folder in (pieces, plain)] == [
        True,
        False,
    ]


FULL = {"recipe": "qwen-image-full", "mixed_precision": "bf16", "learning_rate": 1e-3}


@pytest.mark.parametrize("flags", [{}, {"optimizer": "adafactor"}], ids=["adamw", "adafactor"])
def test_full_training_in_bf16_resumes_to_the_bit_and_takes_what_is_planned(plan, flags):
    given = {"trained_dtype": "bf16", **FULL, **flags}
    made = plan("through", **given)
    through = run(made)
    run(plan("pieces", max_steps=2, **given))
    pieces = run(plan("pieces", resume="auto", **given))
    assert all((through / file).read_bytes() == (pieces / file).read_bytes() for file in FILES)
    weights = read_header(through / FILES[2]).tensors.values()
    assert {entry.dtype for entry in weights} == {"BF16"}
    state = [entry for entry in read_header(through / FILES[1]).tensors.values() if entry.shape]
    assert sum(entry.nbytes for entry in (*weights, *state)) == state_bytes(made)
    rank = made.parameters.lora_rank
    assert sorted(trained_tensor_bytes(made, rank, "bf16")) == sorted(entry.nbytes for entry in weights)
    float32 = plan("float32", **(given | {"trained_dtype": "float32"}))
    configs = [memory_config(each, find_workload(each).largest) for each in (made, float32)]
    ours, wide = (device_memory(float32, config).training for config in configs)
    assert (ours, wide) == tuple(device_memory(made, config).training for config in configs)
    assert 2 * ours.weights["dit"] == wide.weights["dit"] and 2 * ours.gradients == wide.gradients
    assert ours.optimizer == wide.optimizer


def test_the_default_is_what_it_was(plan):
    """Named or not, with what the parameters say in arguments instead."""
    files = [
        (run(plan(f"run-{number}", **flags)) / FILES[0]).read_bytes()
        for number, flags in enumerate(
            ({}, {"optimizer": "adamw"}, {"optimizer_args": "betas=0.9,0.999 weight_decay=0.01"}, {"optimizer": "lion"})
        )
    ]
    assert files[0] == files[1] == files[2] != files[3]
