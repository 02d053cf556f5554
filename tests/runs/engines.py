"""What every engine trains, and a program that trains all of it: `torchrun … -m tests.runs.engines CASES.json`.

One start of the processes for many runs: most of its time is imports.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffsynth_cli.main import main
from tests.conftest import ENTRIES

PROCESSES = 2
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO, ZERO_SETTING = {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_DEEPSPEED"
ENGINES: Mapping[str, Mapping[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
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
CHANGES = {
    "one row over two processes": ("lora", ("--lora_rank", "1")),
    "clipped": ("lora", ("--max_grad_norm", "0.01")),
    "8-bit floats": ("lora", ("--fp8_models", QWEN_DIT)),
    "int8": ("lora", ("--quant_options", f"{QWEN_DIT}:int8")),
    "nf4": ("lora", ("--quant_options", f"{QWEN_DIT}:nf4")),
    "activations on the host": ("lora", ("--use_gradient_checkpointing_offload",)),
    "nested checkpoints": ("lora", ("--checkpointing", "nested")),
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


def train_in_processes(engine: str, runs: Mapping[Path, Sequence[str]], folder: Path, models: Path) -> None:
    """Train all in processes that torchrun starts once; output folder -> flags."""
    cases = folder / f"cases-{len(list(folder.iterdir()))}.json"
    named = {str(output): list(flags) for output, flags in runs.items()}
    cases.write_text(json.dumps({"variables": dict(ENGINES[engine]), "runs": named}))
    launcher = ["torch.distributed.run", "--nproc_per_node", str(PROCESSES), "--standalone"]
    process = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", __name__, str(cases)],
        env=os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(models), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr


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


def train_cases(path: Path) -> None:
    cases = json.loads(path.read_text())
    for output, flags in cases["runs"].items():
        os.environ |= cases["variables"]
        train_here({Path(output): flags})


if __name__ == "__main__":
    try:
        train_cases(Path(sys.argv[1]))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
