"""Runs that keep moving averages of their weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.memory.disk import checkpoint_bytes, state_bytes
from diffsynth_core.planning.memory.estimate import device_memory, host_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.headers import read_header

LORA = ("--recipe", "qwen-image-lora", "--lora_rank", 2, "--learning_rate", 0.01)
FULL = ("--recipe", "qwen-image-full", "--learning_rate", 0.001)
COMMON = ("--device", "cpu", "--dataset_num_workers", 0, "--ema_decay", 0.3)


@pytest.fixture
def train(train_into) -> Callable[..., Path]:
    """Train on the photographs, and return the folder of the run."""
    return lambda folder, *flags: train_into(folder, *COMMON, *flags)


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "run.json").read_text())["checkpoints"]
    return found


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["validation_loss"] for line in (folder / "validation.jsonl").read_text().splitlines()]


def check_close(one: Path, other: Path) -> None:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-5)


def test_averages_are_saved_beside_checkpoints_and_change_no_weight(train):
    """Those of the documented formula, from the checkpoints of all steps, under the same keys."""
    folder = train("out", *LORA, "--save_steps", 1, "--max_steps", 4)
    saved = entries(folder)
    assert [entry["average"]["file"] for entry in saved] == [f"step-{step}.ema.safetensors" for step in (1, 2, 3, 4)]
    expected: dict[str, torch.Tensor] = {}
    for step, entry in enumerate(saved):
        weights, averages = (load_file(folder / name) for name in (entry["file"], entry["average"]["file"]))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * expected.get(name, weight) + (1 - decay) * weight for name, weight in weights.items()}
        assert averages.keys() == weights.keys()
        for name, average in averages.items():
            torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-8)
        assert entry["average"]["bytes"] == (folder / entry["average"]["file"]).stat().st_size
    without = train("without", *LORA, "--max_steps", 4, "--ema_decay", 0.999)
    last = entries(without)[-1]
    assert (without / last["file"]).read_bytes() == (folder / saved[-1]["file"]).read_bytes()
    assert (without / last["average"]["file"]).read_bytes() != (folder / saved[-1]["average"]["file"]).read_bytes()


def test_without_averages_nothing_is_kept(cli, train, photographs):
    with_averages = train("with", *LORA, "--max_steps", 3)
    flags = ("--device", "cpu", "--dataset_num_workers", 0, "--dataset_base_path", photographs)
    assert cli("train", *LORA, *flags, "--max_steps", 3, "--output_path", "without").code == 0
    names = [path.name for path in Path("without").glob("*.safetensors")]
    assert names == ["epoch-0.safetensors"] and entries(Path("without"))[0]["average"] is None
    assert Path("without", *names).read_bytes() == (with_averages / names[0]).read_bytes()
    state = "state/step-3/optimizer.safetensors"
    kinds = [{name.rpartition("/")[2] for name in load_file(run / state)} for run in (Path("without"), with_averages)]
    assert kinds[1] - kinds[0] == {"ema"}


WAYS = {
    "lora": LORA,
    "waiting blocks": (*FULL, "--fused_backward", "--use_gradient_checkpointing", "--blocks_to_swap", 1),
    "bf16, state on the host": (*FULL, "--trained_dtype", "bf16", "--mixed_precision", "bf16",
                                "--enable_optimizer_cpu_offload"),
}  # fmt: skip


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_a_resumed_run_ends_with_the_same_averages(train, tiny_models, photographs, flags):
    """With and without their validation, which takes none of the numbers that training needs."""
    through = train("through", *flags, "--max_steps", 4)
    validated = ("--validation_split", photographs, "--evaluate_ema", "--validate_every", 1)
    train("pieces", *flags, "--max_steps", 2)
    train("pieces", *flags, "--max_steps", 4, "--resume", "auto")
    watched = train("watched", *flags, "--max_steps", 4, *validated)
    names = [*(entries(through)[-1][key] for key in ("file",)), entries(through)[-1]["average"]["file"],
             "state/step-4/optimizer.safetensors", "state/step-4/trained.safetensors"]  # fmt: skip
    for name in names:
        assert (through / name).read_bytes() == (Path("pieces") / name).read_bytes() == (watched / name).read_bytes()


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., RunPlan]:
    def plan(**flags: object) -> RunPlan:
        given = {"dataset_base_path": str(photographs), "device": "cpu", "dataset_num_workers": 0, "max_steps": 1,
                 "output_path": str(tmp_path / "out")}  # fmt: skip
        return make_plan(resolve(given | flags), SilentReporter(), base=tiny_models)

    return plan


def test_the_plan_counts_them(plan, train):
    """4 bytes a trained number of memory and of the state, and the checkpoint twice."""
    with_averages, without = (
        plan(recipe="qwen-image-lora", lora_rank=2, **flags) for flags in ({"ema_decay": 0.3}, {})
    )
    folder = train("run", *LORA, "--max_steps", 1)
    of_state = [
        entry.nbytes
        for name in ("optimizer", "trained")
        for entry in read_header(folder / f"state/step-1/{name}.safetensors").tensors.values()
        if entry.shape
    ]
    numbers = checkpoint_bytes(without) // 4
    assert sum(of_state) == state_bytes(with_averages) == state_bytes(without) + 4 * numbers
    of_files = [read_header(path).tensors.values() for path in folder.glob("*.safetensors")]
    assert sum(entry.nbytes for entries in of_files for entry in entries) == checkpoint_bytes(with_averages)
    sizes = [device_memory(made, memory_config(made, find_workload(made).largest)).training for made in
             (with_averages, without)]  # fmt: skip
    assert sizes[0].total - sizes[1].total == sizes[0].optimizer - sizes[1].optimizer == 4 * numbers


def test_the_plan_counts_what_is_set_aside_while_they_are_validated(plan):
    """Weights on the device and in host memory; only with a fused backward pass, which leaves no room of gradients."""
    flags = {"recipe": "qwen-image-full", "use_gradient_checkpointing": True, "ema_decay": 0.3,
             "validation_split": "0.25", "evaluate_ema": True}  # fmt: skip
    plain, fused, swapped = (
        plan(**flags, **more) for more in ({}, {"fused_backward": True}, {"fused_backward": True, "blocks_to_swap": 1})
    )
    found = []
    for made in (plain, fused, swapped):
        run = find_workload(made)
        config = memory_config(made, run.largest)
        memory = device_memory(made, config)
        host = host_memory(made, config, memory, run.encoded)
        found.append((memory.training, sum(size for name, size in host.items() if "evaluated" in name)))
    trained = found[0][0].gradients
    assert [memory.set_aside for memory, _ in found] == [0, trained, trained - found[2][0].swapped]
    assert [waiting for _, waiting in found] == [0, 0, found[2][0].swapped]


def test_the_averages_are_validated_and_the_weights_train_on(train, photographs):
    """The loss is that of a run that begins with the averages."""
    flags = (*LORA, "--validation_split", photographs, "--lora_rank", 2)
    weights = train("weights", *flags, "--max_steps", 3)
    averages = train("averages", *flags, "--max_steps", 3, "--evaluate_ema")
    assert losses(weights)[0] == losses(averages)[0] and losses(weights)[1] != losses(averages)[1]
    assert entries(averages)[0]["validation_loss"] == losses(averages)[1]
    for kind in ("epoch-0", "epoch-0.ema"):
        files = [(folder / f"{kind}.safetensors").read_bytes() for folder in (weights, averages)]
        assert files[0] == files[1]
    again = train("again", *flags, "--max_steps", 1, "--lora_checkpoint", averages / "epoch-0.ema.safetensors")
    assert losses(again)[0] == losses(averages)[1]


def test_previews_are_drawn_with_the_averages(train):
    """Those of a run that begins with them; training goes on with the weights."""
    flags = (*LORA, "--learning_rate", 0.05, "--preview_prompts", "a fox", "--preview_steps", 2, "--preview_every", 3)
    weights = train("weights", *flags, "--max_steps", 3)
    averages = train("averages", *flags, "--max_steps", 3, "--evaluate_ema")
    again = train("again", *flags, "--max_steps", 1, "--lora_checkpoint", averages / "epoch-0.ema.safetensors")
    drawn = [(folder / f"samples/step-{step}/0001.png") for folder, step in ((weights, 3), (averages, 3), (again, 0))]
    of_weights, of_averages, expected = (np.asarray(Image.open(path)) for path in drawn)
    assert (of_averages == expected).all() and (of_weights != of_averages).any()
    assert (weights / "epoch-0.safetensors").read_bytes() == (averages / "epoch-0.safetensors").read_bytes()


def test_averages_are_deleted_with_their_checkpoint(train):
    folder = train("out", *LORA, "--save_steps", 1, "--max_steps", 3, "--keep_checkpoints", 1)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "step-3.ema.safetensors",
        "step-3.safetensors",
    ]


def test_a_run_resumes_with_the_same_decay_alone(cli, train, photographs):
    train("out", *LORA, "--max_steps", 1)
    flags = (*COMMON, "--dataset_base_path", photographs, "--output_path", "out", "--max_steps", 2, "--resume", "auto")
    outcome = cli("train", *LORA, *flags, "--ema_decay", 0.9)
    assert outcome.code == 2 and "`ema_decay` was `0.3` in the run in `out`, now it is `0.9`" in outcome.err


def test_other_commands_read_averages_as_checkpoints(cli, train):
    lora, full = train("lora", *LORA, "--max_steps", 3), train("full", *FULL, "--max_steps", 1)
    small = ("--device", "cpu", "--height", 32, "--width", 32, "--steps", 1, "--prompt", "a fox")
    drawn = []
    for kind in ("epoch-0", "epoch-0.ema"):
        outcome = cli("generate", "--recipe", "qwen-image-lora", "--lora", lora / f"{kind}.safetensors", *small,
                      "--out", kind)  # fmt: skip
        assert outcome.code == 0, outcome.err
        drawn.append(Path(outcome.out.strip()).read_bytes())
    assert drawn[0] != drawn[1]
    outcome = cli("split-ckpt", full / "epoch-0.ema.safetensors", "--output_path", "parts")
    assert outcome.code == 0, outcome.err
    outcome = cli("merge-lora", "--lora", lora / "epoch-0.ema.safetensors", "--base", "Qwen/Qwen-Image:transformer/*.safetensors",
                  "--output_path", "merged")  # fmt: skip
    assert outcome.code == 0, outcome.err


def test_two_processes_average_what_one_does(train, train_in_two):
    flags = (*LORA, "--max_steps", 3)
    two = train_in_two("two", *COMMON, *flags)
    one = train("one", *flags, "--gradient_accumulation_steps", 2)
    check_close(two / "epoch-0.ema.safetensors", one / "epoch-0.ema.safetensors")


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_averages_of_sharded_weights_are_saved_and_validated(train, train_in_two, photographs, engine):
    """As in one process; training goes on with the weights."""
    flags = (*LORA, "--max_steps", 3, "--validation_split", photographs, "--validate_every", 1, "--evaluate_ema")
    sharded = train_in_two("sharded", *COMMON, *flags, engine=engine)
    one = train("one", *flags, "--gradient_accumulation_steps", 2)
    for kind in ("epoch-0", "epoch-0.ema"):
        check_close(sharded / f"{kind}.safetensors", one / f"{kind}.safetensors")
    assert losses(sharded) == pytest.approx(losses(one), rel=1e-5) and len(losses(sharded)) == 4
