"""Two machines, played by two launchers on this one: each has a cache, an output folder and a rank of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from diffsynth_cli.main import main
from tests.covering import long_ones
from tests.waiting import wait_until

COMMON = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--learning_rate", "0.01", "--device", "cpu")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Machines:
    """Two machines with folders of their own in `folder`; `shared`: they mount one cache."""

    def __init__(self, folder: Path, models: Path, photographs: Path, shared: bool) -> None:
        self._folder, self._models, self._photographs, self._shared = folder, models, photographs, shared

    def output(self, rank: int) -> Path:
        return self._folder / f"machine-{rank}" / "out"

    def start(self, *flags: str, refused: int | None = None) -> list["subprocess.Popen[str]"]:
        """Start both; `refused`: the rank of one whose metadata is missing."""
        meeting = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        meeting += ["--main_process_port", str(free_port())]
        wrong = ["--dataset_metadata_path", "no_such.csv"]
        return [
            self._start(rank, [*meeting, "--machine_rank", str(rank), *flags, *(wrong if rank == refused else [])])
            for rank in range(2)
        ]

    def _start(self, rank: int, flags: list[str]) -> "subprocess.Popen[str]":
        home = self._folder / f"machine-{rank}"
        home.mkdir(exist_ok=True)
        cache = self._folder / "cache" if self._shared else home / "cache"
        command = [sys.executable, "-m", "diffsynth_cli", "train", *COMMON, "--cache_path", str(cache)]
        command += ["--dataset_base_path", str(self._photographs), "--output_path", str(self.output(rank)), *flags]
        return subprocess.Popen(
            command,
            cwd=home,
            env=os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(self._models), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def train(self, *flags: str) -> list[str]:
        """Train on both; return what each wrote to stderr."""
        started = self.start(*flags)
        try:
            errors = [process.communicate(timeout=500)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0, 0], errors
        return errors


@pytest.fixture
def machines(tmp_path: Path, tiny_models: Path, photographs: Path):
    return lambda shared: Machines(tmp_path, tiny_models, photographs, shared)


def trained_here(tmp_path: Path, tiny_models: Path, photographs: Path, *flags: str) -> dict[str, torch.Tensor]:
    output = tmp_path / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
        command = ["train", *COMMON, "--dataset_base_path", str(photographs), "--gradient_accumulation_steps", "2"]
        assert main([*command, "--output_path", str(output), *flags]) == 0
    return load_file(output / "step-4.safetensors")


STEPS = ("--dataset_repeat", "4", "--save_steps", "2")


def test_two_machines_train_one_run_and_only_the_first_needs_its_states(machines, tmp_path, tiny_models, photographs):
    two = machines(False)
    mirror = ("--mirror", str(tmp_path / "copy"))
    errors = two.train(*STEPS, "--max_steps", "2", *mirror)
    assert "The machines do not share" in errors[0] and "each encodes all" in errors[0]
    assert not two.output(1).exists(), "the first machine saves"
    cached = [len(list((tmp_path / f"machine-{rank}" / "cache").rglob("*.safetensors"))) for rank in range(2)]
    assert cached[0] == cached[1] > 0
    flags = (*STEPS, "--max_steps", "4", "--resume", "auto")
    two.train(*flags, *mirror)  # the second machine is sent step and state, and has no record of the run
    whole = load_file(two.output(0) / "step-4.safetensors")
    alone = trained_here(tmp_path, tiny_models, photographs, *STEPS, "--max_steps", "4")
    assert whole.keys() == alone.keys()
    assert max(float((whole[name] - alone[name]).abs().max()) for name in whole) < 1e-6
    errors = two.train(*flags)
    assert all("Nothing left to do" in text for text in errors), "a loop that restarts all machines ends on all"


def test_a_killed_process_ends_both_machines(machines):
    two = machines(True)
    started = two.start("--dataset_repeat", "1000", "--save_state_steps", "2")
    try:
        wait_until(lambda: (two.output(0) / "state" / "step-2").exists(), 400)
        (trainer,) = [
            process
            for process in psutil.Process(started[1].pid).children(recursive=True)
            if process.environ().get("RANK") == "1"
        ]
        killed = time.monotonic()
        trainer.kill()
        errors = [process.communicate(timeout=120)[1] for process in started]
        seconds = time.monotonic() - killed
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 1], errors
    assert "process on another machine has died" in errors[0] and "`--resume auto`" in errors[0]
    assert "process 2 of 2 was killed (signal 9)" in errors[1]
    print(f"both machines ended {seconds:.0f} s after a process was killed")
    assert seconds < 30
    assert "Traceback" not in errors[0] + errors[1]
    assert list(two.output(0).glob("state/step-*")), "the last state is whole"


@pytest.mark.parametrize("refused", long_ones((0, 1), long=(0,)))
def test_a_machine_that_cannot_start_ends_the_other_one(machines, refused):
    started = machines(True).start(refused=refused)
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert "no_such.csv" in errors[refused]
    assert f"machine {refused} of 2 cannot start" in errors[1 - refused] and "no_such.csv" in errors[1 - refused]
    assert started[1 - refused].returncode == 1 and started[refused].returncode != 0, errors


@pytest.mark.long
def test_the_example_for_slurm_starts_each_machine(machines, tmp_path, photographs, tiny_models):
    """`scontrol` and `srun` are played: one machine, and the command once for each of two nodes."""
    programs = tmp_path / "programs"
    programs.mkdir()
    _program(programs / "scontrol", 'printf "127.0.0.1\\n127.0.0.1\\n"')
    _program(programs / "srun", 'shift; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!')
    _program(programs / "diffsynth", f'exec {sys.executable} -m diffsynth_cli "$@"')
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "PROCESSES": "1",
        "MASTER_PORT": str(free_port()),
        "RECIPE": "qwen-image-lora",
        "DATASET": str(photographs),
        "OUTPUT": str(tmp_path / "out"),
        "DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models),
        "OMP_NUM_THREADS": "1",
    }
    flags = ["--device", "cpu", "--dataset_num_workers", "0", "--max_steps", "2", "--cache_path", str(tmp_path / "a b")]
    script = Path(__file__).parents[2] / "recipes" / "launch" / "slurm.sh"
    found = subprocess.run(["bash", str(script), *flags], env=environment, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["step"], record["micro_batches_per_step"]) == ("completed", 2, 2)


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
