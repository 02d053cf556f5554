"""Two processes that train with any engine: `torchrun … -m tests.runs.engines FOLDER`; and what every engine trains.

They are started once for many runs, of which the first second would otherwise cost a minute of imports.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import psutil
import pytest
from safetensors.torch import load_file

from diffsynth_cli.main import main
from diffsynth_core.training import loop
from diffsynth_core.training.loader import MicroBatch
from tests.conftest import ENTRIES

PROCESSES = 2
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO, ZERO_SETTING = {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_DEEPSPEED"
ENGINES: Mapping[str, Mapping[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "fsdp2 kept": {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"},  # blocks stay gathered after the forward pass
    "fsdp2 offload": {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"},
    "zero1": {**ZERO, f"{ZERO_SETTING}_ZERO_STAGE": "1"},
    "zero2": {**ZERO, f"{ZERO_SETTING}_ZERO_STAGE": "2"},
    "zero2 offload": {
        **ZERO,
        f"{ZERO_SETTING}_ZERO_STAGE": "2",
        f"{ZERO_SETTING}_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    },
    "zero3": {**ZERO, f"{ZERO_SETTING}_ZERO_STAGE": "3"},
    "zero3 offload": {
        **ZERO,
        f"{ZERO_SETTING}_ZERO_STAGE": "3",
        f"{ZERO_SETTING}_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        f"{ZERO_SETTING}_OFFLOAD_PARAM_DEVICE": "cpu",
    },
}
"""Engines by title, and how the launcher asks its processes for them."""
ENGINE_VARIABLES = {name for variables in ENGINES.values() for name in variables}
POLL_SECONDS = 0.02
COMMON = ("--device", "cpu", "--dataset_num_workers", "0", "--num_epochs", "1", "--dataset_repeat", "3")
RECIPES = {
    "qwen-image": "qwen-image",
    "flux": "flux.1-dev",
    "flux2": "flux.2-klein-4b",
    "wan": "wan2.1-t2v-1.3b",
}
"""The recipe of each family without its task."""
# Three rows of LoRA over two processes: uneven shares. Gradients near zero have a random sign, which Adam would make
# whole steps of; a large eps does not.
TASKS = {
    "lora": ("--lora_rank", "3", "--learning_rate", "0.01"),
    "full": ("--learning_rate", "0.001", "--optimizer_args", "eps=1e-3", "--save_dtype", "float32"),
}


QWEN_DIT = ENTRIES["dit"]
CONTROLNET = "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors"
NESTED = "nested checkpoints"
CHANGES = {
    "one row over two processes": ("lora", ("--lora_rank", "1")),
    "clipped": ("lora", ("--max_grad_norm", "0.01")),
    "8-bit floats": ("lora", ("--fp8_models", QWEN_DIT)),
    "int8": ("lora", ("--quant_options", f"{QWEN_DIT}:int8")),
    "nf4": ("lora", ("--quant_options", f"{QWEN_DIT}:nf4")),
    "activations on the host": ("lora", ("--use_gradient_checkpointing_offload",)),
    NESTED: ("lora", ("--checkpointing", "nested")),
    "attention kept": ("lora", ("--checkpointing", "keep_attention")),
    "every second block kept": ("lora", ("--checkpointing", "keep_every_2")),
    "averages": ("full", ("--ema_decay", "0.5")),
    "no checkpointing": ("full", ("--no-use_gradient_checkpointing",)),
}
"""What engines that shard have to get along with; name -> task of Qwen-Image, and further flags."""
OBJECTIVES = {
    "distillation": ("lora", ("--task", "direct_distill", "--dataset_metadata_path", "{folder}/distilled.csv")),
    "text encoder, ControlNet and LoRA": (
        "full",
        (
            *("--model_id_with_origin_paths", ",".join((*ENTRIES.values(), CONTROLNET))),
            *("--trainable_models", "text_encoder,controlnet", "--lora_base_model", "dit", "--lora_rank", "3"),
            *("--lora_target_modules", "to_q,to_k,to_v", "--remove_prefix_in_ckpt", "pipe.dit."),
            *("--extra_inputs", "controlnet_image", "--data_file_keys", "image,controlnet_image"),
            *("--dataset_metadata_path", "{folder}/pairs.csv"),
        ),
    ),
}
"""Further components and objectives, in the same form; `{folder}`: that of the test."""


def flags_of(family: str, task: str) -> tuple[str, ...]:
    """Return the flags of a run of three steps: of four samples, four, and one."""
    video = ("--height", "32", "--width", "48", "--num_frames", "1") if family == "wan" else ()
    return ("--recipe", f"{RECIPES[family]}-{task}", *COMMON, *TASKS[task], *video)


def train_here(runs: Mapping[Path, Sequence[str]]) -> None:
    """Train in this process; output folder -> flags."""
    for output, flags in runs.items():
        code = main(["train", *flags, "--output_path", str(output)])
        assert code == 0, f"{output} ended with {code}"


class TwoProcesses:
    """Two processes that wait for runs. They are started for the first one, and again after one that failed."""

    def __init__(self, folder: Path) -> None:
        """`folder`: one for what they are asked and answer."""
        self._folder, self._asked = folder, 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TwoProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def train(self, engine: str, runs: Mapping[Path, Sequence[str]], models: Path) -> None:
        """Train all with one engine, from the folder of this process; output folder -> flags.

        Raises:
            AssertionError: if one of them does not end with 0, with what the processes wrote.
        """
        if self._process is None:
            self._start()
        assert self._process
        self._asked += 1
        variables = {**ENGINES[engine], "DIFFSYNTH_MODEL_BASE_PATH": str(models)}
        named = {str(output): [str(flag) for flag in flags] for output, flags in runs.items()}
        content = json.dumps({"variables": variables, "runs": named, "folder": str(Path.cwd())})
        written = self._folder / "asked.tmp"
        written.write_text(content)
        written.replace(self._folder / f"asked-{self._asked}.json")
        answers = [self._folder / f"answer-{self._asked}-{rank}" for rank in range(PROCESSES)]
        try:
            while not all(answer.exists() for answer in answers):
                assert self._process.poll() is None, (self._folder / "said").read_text()[-10_000:]
                time.sleep(POLL_SECONDS)
        except BaseException:  # also when the test takes too long: they are not to be asked again
            self._end()
            raise

    def _start(self) -> None:
        launcher = ["torch.distributed.run", "--nproc_per_node", str(PROCESSES), "--standalone"]
        arguments = map(str, (self._folder, self._asked, os.getpid()))
        with (self._folder / "said").open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", __name__, *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def _end(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(60)
            self._process = None


def losses_of(output: Path) -> list[float]:
    """Return the loss of each step of a run."""
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def difference(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest differences of losses and of checkpoints, which have the same files, names and dtypes."""
    losses = [abs(left - right) for left, right in zip(losses_of(one), losses_of(other), strict=True)]
    files = [sorted(path.name for path in output.glob("*.safetensors")) for output in (one, other)]
    assert files[0] == files[1]
    weights = []
    for name in files[0]:
        left, right = load_file(one / name), load_file(other / name)
        kinds = [{key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()} for tensors in (left, right)]
        assert kinds[0] == kinds[1]
        weights += [float((left[key].float() - right[key].float()).abs().max()) for key in left]
    return max(losses), max(weights)


def noise_of(reference: Path, train: Callable[[], Path]) -> tuple[float, float]:
    """Return what one process differs from itself, as `difference` does, if it computes two or all of the four
    samples of a step together, so that sums have another order.

    Args:
        reference: folder of a run with four micro-batches a step, each of one sample.
        train: trains the same once more, and returns the folder.
    """
    fetch, found = loop.Run._fetch, []
    for size in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Run, "_fetch", lambda *asked, size=size: _joined(fetch(*asked), size))
            found.append(difference(reference, train()))
    losses, weights = zip(*found, strict=True)
    return max(losses), max(weights)


def _joined(fetched: list[MicroBatch], size: int) -> list[MicroBatch]:
    """Return the same samples, which have the same shape, in micro-batches of another size."""
    pieces = [fetched[start : start + size] for start in range(0, len(fetched), size)]
    joined = [
        {name: sum((getattr(one, name) for one in piece), ()) for name in ("refs", "encoded", "raw")}
        for piece in pieces
    ]
    return [replace(piece[0], **parts) for piece, parts in zip(pieces, joined, strict=True)]


def serve(folder: Path, number: int, asking: int) -> None:
    """Train what is asked for in a folder, from request `number` + 1 on, while process `asking` lives."""
    while True:
        number += 1
        asked = folder / f"asked-{number}.json"
        while not asked.exists():
            if not psutil.pid_exists(asking):
                return
            time.sleep(POLL_SECONDS)
        content = json.loads(asked.read_text())
        for name in ENGINE_VARIABLES:
            os.environ.pop(name, None)
        os.chdir(content["folder"])
        for output, flags in content["runs"].items():
            os.environ |= content["variables"]
            train_here({Path(output): flags})
        (folder / f"answer-{number}-{os.environ['RANK']}").touch()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), *map(int, sys.argv[2:]))
