"""Blocks in host memory on the command line: what the plan says of them, and what is wrong with a combination."""

import json
from pathlib import Path

import pytest

from diffsynth_core.planning.memory import host_memory
from tests.conftest import ENTRIES
from tests.naming import names

RUN = ("train", "--recipe", "qwen-image-lora", "--device", "cpu", "--dataset_num_workers", 0)


@pytest.fixture
def plan(cli, dataset):
    def run(*flags: object):
        outcome = cli(*RUN, "--dataset_base_path", dataset, "--dry_run", *flags)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


def test_the_plan_says_how_many_wait_where(plan, says):
    lines = plan("--blocks_to_swap", 1).splitlines()
    assert "1 of 2 blocks of dit wait in host memory" in " ".join(line.strip() for line in lines)
    start = next(index for index, line in enumerate(lines) if line.startswith("Placement"))
    says("\n".join(lines[start : start + 2]))
    assert "Placement" not in plan()


def test_memory_of_the_device_and_of_the_host_is_told_by_part(plan):
    told = plan("--blocks_to_swap", 2, "-v")
    assert "swapped blocks while they are on the device, 2 at a time" in told
    assert "swapped blocks of dit, in each process" in told


@pytest.mark.parametrize(
    ("memory", "number"), [("24GB", 0), ("0.0001GB", 2)], ids=["fits without", "does not fit with all"]
)
def test_auto_is_the_fewest_that_fit(cli, dataset, memory, number):
    """Of two blocks none helps, because two are on the device at a time."""
    flags = ("--dataset_base_path", dataset, "--max_steps", 1, "--blocks_to_swap", "auto", "--gpu_memory", memory)
    outcome = cli(*RUN, *flags, "--output_path", "out")
    assert outcome.code == 0, outcome.err
    assert json.loads(Path("out/run.json").read_text())["parameters"]["blocks_to_swap"] == number
    dry = cli(*RUN, *flags, "--dry_run")
    assert dry.code == (0 if number == 0 else 3)
    assert ("with all blocks in host memory the run still needs" in dry.out) == (number > 0)


FULL = ("--recipe", "qwen-image-full")
PROBLEMS = {
    "more than there are": (("--blocks_to_swap", 3), names("blocks_to_swap", 3, "dit", "2 blocks"), "--blocks_to_swap 2"),
    "of a model in training": ((*FULL, "--blocks_to_swap", 1), names("blocks_to_swap", "dit train", "--fused_backward"), "--fused_backward"),
    "all of a model in training": (
        (*FULL, "--enable_model_cpu_offload"), names("enable_model_cpu_offload", "--fused_backward"), "--fused_backward",
    ),
    "more than are frozen": (
        ("--blocks_to_swap", 2, "--trainable_models", "dit.transformer_blocks.1"),
        names("blocks_to_swap", 2, "1 frozen block"), "--blocks_to_swap 1",
    ),
    "auto for no GPU": (("--blocks_to_swap", "auto"), names("blocks_to_swap", "auto", "gpu_memory"), "--gpu_memory"),
    "twice": (
        ("--blocks_to_swap", 1, "--enable_model_cpu_offload"),
        names("enable_model_cpu_offload", "blocks_to_swap"), "remove one of them",
    ),
    "parts of none": (
        ("--cpu_offload_split_threshold", 5), names("cpu_offload_split_threshold"), "--blocks_to_swap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_cannot_be_is_told(refuse, case):
    flags, message, hint = PROBLEMS[case]
    code, problems = refuse(*flags)
    assert (code, len(problems)) == (2, 1), problems
    assert problems[0] == (message, names(hint))


def test_all_of_them_are_told_in_one_report(refuse):
    flags = ("--blocks_to_swap", 9, "--lora_target_modules", "to_qq", "--resume", "never")
    code, problems = refuse(*flags)
    assert code == 2 and len(problems) == 3


def test_too_little_host_memory_is_told_before_anything_is_loaded(cli, dataset, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100_000)
    flags = ("--dataset_base_path", dataset, "--blocks_to_swap", 2, "--output_path", "out")
    outcome = cli(*RUN, *flags)
    assert outcome.code == 1 and "Loading" not in outcome.err
    assert "of host memory (" in outcome.err and "for swapped blocks of dit, in each process" in outcome.err
    assert "hint: lower `--blocks_to_swap`" in outcome.err
    told = cli(*RUN, *flags, "--dry_run")
    assert told.code == 0 and "warning: the run needs" in told.out
    assert (
        "the run needs" not in cli(*(word for word in RUN if word not in ("--device", "cpu")), *flags, "--dry_run").out
    )


def test_a_rehearsal_swaps_as_many_as_its_model_has(cli):
    outcome = cli(*RUN, "--rehearse", "--blocks_to_swap", 45, "--max_steps", 2, "--output_path", "out")
    assert outcome.code == 0, outcome.err
    assert "The rehearsal swaps 2 blocks (instead of 45)" in outcome.err
    assert ENTRIES["dit"] not in outcome.err


def test_a_precompute_task_takes_what_its_recipe_says_of_training(cli, dataset):
    task = ("--task", "sft:data_process", "--blocks_to_swap", 99, "--dry_run")
    assert cli(*RUN, "--dataset_base_path", dataset, *task).code == 0
