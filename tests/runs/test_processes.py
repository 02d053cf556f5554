"""Two processes under gloo: the same weights as one that accumulates two micro-batches, and one stop for both."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from diffsynth_cli import launching
from diffsynth_cli.main import main
from diffsynth_core.checkpoints.run_folder import claim_folder
from diffsynth_core.data.captions import draw_choice
from tests.conftest import ENTRIES
from tests.killing import TrainingRun, steps_done
from tests.waiting import alive, wait_until

RECIPES = {
    "qwen-image-lora": (),
    "flux.1-dev-lora": (),
    "flux.2-klein-4b-lora": (),
    "wan2.1-t2v-1.3b-lora": ("--height", "32", "--width", "48", "--num_frames", "1"),
}
"""A recipe of each family, with flags for a small run; other recipes need none."""
QWEN = ("--recipe", "qwen-image-lora")
COMMON = ("--dataset_num_workers", "0", "--learning_rate", "0.01", "--device", "cpu")


def launch(arguments: list[str], models: Path, folder: Path, accelerate: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run our command as it is, or in accelerate's launcher with its options."""
    command = [sys.executable, "-m", "diffsynth_cli", "train", *COMMON, *arguments]
    environment = os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(models), "OMP_NUM_THREADS": "1"}
    if accelerate:
        launcher = ["-m", "accelerate.commands.launch", *accelerate]
        command = [sys.executable, *launcher, "-m", *command[2:]]
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for what `launch` has started; return its exit code, and what it wrote to stdout and stderr."""
    try:
        reported, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, reported, errors


def launch_all(flags: list[str], models: Path, folder: Path, accelerate: tuple[str, ...] = ()) -> None:
    code, reported, errors = end_of(launch(flags, models, folder, accelerate))
    assert code == 0, errors
    assert reported.count("Checkpoint  ") == 1, "one process tells"
    assert "Warning" not in errors and (accelerate or "had defaults used" not in errors), errors


def train_here(flags: list[str], models: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(models))
        assert main(["train", *COMMON, *flags]) == 0


TWO = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
ACCUMULATING = ("--gradient_accumulation_steps", "2")
OURS, THEIRS = (("--num_processes", "2"), ()), (("--find_unused_parameters",), TWO)


@pytest.fixture(scope="module")
def train(recipe_models, photographs, two_processes, tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """Train a recipe on the photographs, in one process with accumulation, by a launch, or else in the two that are
    started once; return its LoRA.
    """
    folder = tmp_path_factory.mktemp("processes")
    metadata = folder / "metadata.csv"  # Wan takes images as clips of one frame
    rows = (photographs / "metadata.csv").read_text(encoding="utf-8")
    metadata.write_text(rows.replace("image", "video", 1), encoding="utf-8")

    @cache
    def run(recipe: str, arguments: tuple[str, ...], accelerate: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        output = folder / f"out-{len(list(folder.iterdir()))}"
        dataset = ["--dataset_base_path", str(photographs), "--num_epochs", "1"]
        dataset += [] if "--dataset_repeat" in arguments else ["--dataset_repeat", "2"]
        dataset += ["--dataset_metadata_path", str(metadata)] if recipe.startswith("wan") else []
        flags = ["--recipe", recipe, *RECIPES.get(recipe, ()), *dataset, *arguments, "--output_path", str(output)]
        if arguments[:2] == ACCUMULATING:
            train_here(flags, recipe_models(recipe))
        elif accelerate or "--num_processes" in arguments:
            launch_all(flags, recipe_models(recipe), folder, accelerate)
        else:
            two_processes.train("ddp", {output: [*COMMON, *flags]}, recipe_models(recipe))
        return load_file(output / "epoch-0.safetensors")

    return run


BY_LAUNCHER = [
    pytest.param(recipe, *launched, id=f"{launcher}-{recipe}", marks=marks)
    for launcher, launched, recipes, marks in (
        ("ours", OURS, [*RECIPES][:1], ()),
        ("ours", OURS, [*RECIPES][1:], pytest.mark.long),
        ("accelerate's", THEIRS, RECIPES, pytest.mark.long),
    )
    for recipe in recipes
]
"""A launcher does the same with every family, so one is enough."""


@pytest.mark.parametrize(("recipe", "arguments", "accelerate"), BY_LAUNCHER)
def test_two_processes_train_what_one_does_with_accumulation(train, recipe, arguments, accelerate):
    one = train(recipe, ACCUMULATING)
    two = train(recipe, arguments, accelerate)
    assert one.keys() == two.keys()
    off = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(f"{recipe} in two processes: off by {off:.1e}")
    assert off < 1e-6


IN_PARTS = ("--blocks_to_swap", "2", "--cpu_offload_split_threshold", "0")
"""All blocks in host memory, layer by layer."""


STATE_ON_HOST = ("--enable_optimizer_cpu_offload",)
EIGHT_STEPS = ("--dataset_repeat", "4")
ON_HOST = (("qwen-image-lora", IN_PARTS), ("qwen-image-lora", STATE_ON_HOST), ("qwen-image-full", STATE_ON_HOST))
"""Blocks that train wait in host memory only with fused updates, which are of one process."""


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "placed"), ON_HOST)
def test_two_processes_train_the_same_whatever_waits_in_host_memory(train, recipe, placed):
    without, waiting = (train(recipe, (*EIGHT_STEPS, *arguments)) for arguments in ((), placed))
    assert without.keys() == waiting.keys()
    assert all(torch.equal(tensor, waiting[name]) for name, tensor in without.items())


STORED = [
    pytest.param(("--fp8_models", f"{ENTRIES['dit']},{ENTRIES['text_encoder']}"), IN_PARTS, id="8-bit floats"),
    pytest.param(("--quant_options", f"{ENTRIES['dit']}:nf4"), (), id="nf4", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("stored", "placed"), STORED)
def test_two_processes_share_stored_weights_and_drop_the_captions_that_one_drops(train, stored, placed):
    """Those in 8-bit floats wait in host memory where there are two processes."""
    dropped = [draw_choice(1, 0.5, 0, 0, sample, repeat) for sample in range(4) for repeat in range(2)]
    assert 2 <= sum(dropped) <= 6, "some of the draws are without their caption"
    changed = (*stored, "--caption_dropout", "0.5")
    one = train("qwen-image-lora", (*ACCUMULATING, *changed))
    two = train("qwen-image-lora", (*changed, *placed))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


OPTIMIZERS = ("adafactor", *(pytest.param(name, marks=pytest.mark.long) for name in ("adamw8bit", "came", "muon")))
"""Those that a last bit of a gradient moves little, unlike Lion, which takes its sign."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_update_as_one_with_other_optimizers(train, name):
    """With a state in host memory, in two processes."""
    flags = ("--optimizer", name, "--learning_rate", "0.001")
    one = train("qwen-image-lora", (*ACCUMULATING, *flags))
    two = train("qwen-image-lora", (*flags, "--enable_optimizer_cpu_offload"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_two_processes_train_weights_in_bf16_as_one_does(train):
    """They round the same numbers up and down: of all weights, few are off, and those by the distance of neighbors."""
    flags = ("--trained_dtype", "bf16", "--mixed_precision", "bf16", "--learning_rate", "0.001")
    one = train("qwen-image-full", (*ACCUMULATING, *flags))
    two = train("qwen-image-full", flags)
    off = torch.cat([(one[name].float() - two[name].float()).abs().flatten() for name in one])
    print(f"{(off > 0).float().mean():.2%} of the weights differ, by at most {off.max():.1e}")
    assert (off > 0).float().mean() < 0.05 and off.max() < 0.02


@pytest.mark.parametrize(
    "own", [True, pytest.param(False, marks=pytest.mark.long)], ids=["our launch", "accelerate launch"]
)
def test_a_signal_stops_both_in_the_same_step(tiny_models, photographs, tmp_path, own):
    arguments = [*QWEN, "--dataset_base_path", str(photographs), "--dataset_repeat", "100000", "--output_path", "out"]
    arguments += ["--num_processes", "2"] if own else []
    process = launch(arguments, tiny_models, tmp_path, () if own else TWO)
    wait_until(lambda: alive(process) and steps_done(tmp_path / "out") >= 3, 200)
    if own:
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143 or not own
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["checkpoints"][-1]["step"] == record["step"]


def test_a_launcher_that_starts_one_process_of_two_is_found_out(tiny_models, photographs, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one, without a message."""
    arguments = [*QWEN, "--dataset_base_path", str(photographs), "--output_path", "out"]
    process = launch(arguments, tiny_models, tmp_path, ("--cpu", "--num_processes", "2"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and not (tmp_path / "out").exists()
    assert "error: the launcher requests 2 processes, but the world size is 1\n" in errors


def test_what_is_wrong_is_told_before_anything_is_launched(cli, photographs, monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    arguments = ("--dataset_base_path", photographs, "--num_processes", 2, "--lora_target_modules", "to_x")
    outcome = cli("train", *COMMON, *QWEN, *arguments)
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1 and "no module of dit ends with `to_x`" in outcome.err


VICTIMS = ("outer", "launcher", "rank 0", "rank 1")
KILLS = int(os.environ.get("DIFFSYNTH_TEST_KILLS", "0"))
"""How often each process is killed; by default, the third once."""
ALL_GONE_SECONDS = 30
SENTENCES = {
    "outer": "Interrupted after step {step} of {total_steps}; the run is saved in `out`; continue with `--resume auto`",
    "launcher": "error: the process launcher was killed (signal 9); continue with `--resume auto`",
    "rank 0": "error: process 1 of 2 was killed (signal 9); continue with `--resume auto`",
    "rank 1": "error: process 2 of 2 was killed (signal 9); continue with `--resume auto`",
}
"""Last line on the terminal."""
IN_TWO = [*QWEN, *COMMON, "--dataset_repeat", "500000", "--output_path", "out"]


def processes_of(run: TrainingRun) -> dict[str, psutil.Process]:
    outer = psutil.Process(run.process.pid)
    (launcher,) = outer.children()
    ranks = {f"rank {process.environ()['RANK']}": process for process in launcher.children()}
    return {"outer": outer, "launcher": launcher, **ranks}


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def through(tiny_models, photographs, tmp_path_factory) -> list[float]:
    """The losses of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("through")
    arguments = ["--dataset_base_path", str(photographs), *ACCUMULATING, "--max_steps", "12"]
    train_here([*QWEN, "--dataset_repeat", "500000", *arguments, "--output_path", str(folder / "out")], tiny_models)
    return losses(folder / "out")


@pytest.mark.parametrize("victim", VICTIMS * (KILLS // len(VICTIMS)) or VICTIMS[2:3])
def test_all_end_when_one_is_killed_and_one_process_goes_on(cli, tiny_models, photographs, tmp_path, through, victim):
    arguments = [*IN_TWO, "--dataset_base_path", str(photographs), "--num_processes", "2", "--save_state_steps", "1"]
    output = tmp_path / "out"
    with TrainingRun(arguments, tiny_models, tmp_path) as run:
        assert run.wait_until(lambda: steps_done(output) >= 3), run.stderr()
        processes_of(run)[victim].kill()
        took = run.wait_until_gone(ALL_GONE_SECONDS)
        code, stderr = run.process.wait(), run.stderr()
    record = json.loads((output / "run.json").read_text())
    sentence = SENTENCES[victim].format(**record)
    assert (code, stderr.splitlines()[-1]) == (-9 if victim == "outer" else 1, sentence), stderr
    assert stderr.count("error: ") == (victim != "outer") and "Traceback" not in stderr and "gloo" not in stderr
    assert (output / "train.log").read_text().splitlines()[-1].split(" ", 2)[2] in (
        sentence,
        SENTENCES["outer"].format(**record),
    )
    print(f"{victim} killed: all gone after {took:.1f} s")
    alone = ("--resume", "auto", *ACCUMULATING, "--max_steps", 12, "--output_path", output)
    again = cli("train", *QWEN, *COMMON, "--dataset_repeat", 500000, "--dataset_base_path", photographs, *alone)
    assert again.code == 0, again.err
    off = max(abs(one - other) for one, other in zip(losses(output), through, strict=True))
    print(f"{victim} killed: resumed on one process, losses off by {off:.1e}")
    assert off < 1e-6


def test_the_error_of_one_process_is_the_one_that_is_told(tiny_models, photographs, tmp_path):
    arguments = [*IN_TWO, "--dataset_base_path", str(photographs), "--num_processes", "2"]
    with claim_folder(tmp_path / "out"), TrainingRun(arguments, tiny_models, tmp_path) as run:
        assert run.process.wait() == 1
        stderr = run.stderr()
        assert stderr.count("error: ") == 1
        assert stderr.partition("error: ")[2].splitlines() == [
            "`out` is in use by another run",
            "  hint: wait for it to finish, or choose another `--output_path`",
        ]
        run.wait_until_gone(ALL_GONE_SECONDS)
