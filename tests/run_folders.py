"""Folders of runs that were not run: metrics, validations, previews and checkpoints of any number of steps."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from diffsynth_core.checkpoints.run_folder import (
    METRICS,
    VALIDATIONS,
    CheckpointEntry,
    PreviewImage,
    PreviewList,
    RunRecord,
    preview_folder,
)
from diffsynth_core.config.parameters import as_plain
from diffsynth_core.config.resolve import resolve

PROMPTS = (
    "a red lighthouse at night, long exposure",
    "a ginger cat with green eyes",
    "a cup of coffee on a wooden table, seen from above",
    "an astronaut in an orange suit before a flag",
)
DRAWN = ("rocket", "chelsea", "coffee", "astronaut")
"""Photographs of scikit-image that are drawn for the prompts."""
BANDS = (1.8, 1.1, 0.7, 0.4)
"""Loss by band of timesteps, as multiples of that of all."""
SAMPLES_OF_A_STEP, SAMPLES = 4, 400
CHECKPOINT_BYTES = 94_371_840


def write_run(
    folder: Path, steps: int, total: int | None = None, status: str = "running", every: int = 0, **changes: object
) -> Path:
    """Write a run of the recipe qwen-image-lora.

    Args:
        steps: so many are done, of `total`.
        every: steps from one validation, with a checkpoint, to the next; 0: none.
        changes: parameters.
    """
    total = total or steps
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"recipe": "qwen-image-lora", "dataset_base_path": "data/my images", "max_steps": total}
    record = RunRecord(
        parameters=as_plain(resolve(flags | changes).parameters),
        family="qwen-image",
        seed=0,
        dataset_fingerprint="ab" * 32,
        components={"dit": {"transformer/diffusion_pytorch_model-00001-of-00009.safetensors": "12" * 32}},
        mixed_precision="bf16",
        micro_batches_per_step=SAMPLES_OF_A_STEP,
        id="0f" * 16,
        status=status,
        step=steps,
        total_steps=total,
        samples_seen=steps * SAMPLES_OF_A_STEP,
        seconds=steps * 1.5,
    )
    (folder / METRICS).write_text("".join(f"{line}\n" for line in metric_lines(1, steps, total)))
    if every:
        (folder / VALIDATIONS).write_text(
            "".join(f"{_validation(step, total)}\n" for step in range(0, steps + 1, every))
        )
    for step in range(every, steps + 1, every) if every else ():
        loss = round(_falling(step, total), 4)
        record.add_checkpoint(
            CheckpointEntry(f"step-{step}.safetensors", step, _epoch(step), "ef" * 32, CHECKPOINT_BYTES, loss)
        )
    record.save(folder)
    return folder


def metric_lines(first: int, last: int, total: int) -> list[str]:
    """Lines of `metrics.jsonl`: a noisy loss with a spike in a thousand steps, and steps that wait for data."""
    lines = []
    for step in range(first, last + 1):
        draw = random.Random(step)
        loss = _falling(step, total) + abs(draw.gauss(0, 0.05)) + (1.0 if step % 1000 == 700 else 0.0)
        data = 0.02 + abs(draw.gauss(0, 0.01)) + (0.4 if draw.random() < 0.03 else 0.0)
        line = {
            "step": step, "epoch": _epoch(step), "samples_seen": step * SAMPLES_OF_A_STEP, "loss": loss,
            "lr": 1e-4 * min(1, 20 * step / total), "grad_norm": 0.3 + abs(draw.gauss(0, 0.1)),
            "seconds": round(1.2 + data + abs(draw.gauss(0, 0.03)), 6), "data_seconds": round(data, 6),
        }  # fmt: skip
        lines.append(json.dumps(line))
    return lines


def _epoch(step: int) -> int:
    return step * SAMPLES_OF_A_STEP // SAMPLES


def _falling(step: int, total: int) -> float:
    share = step / total
    return 0.1 + 0.12 * math.exp(-4 * share) + 0.04 * max(0.0, share - 0.6)


def _validation(step: int, total: int) -> str:
    loss = _falling(step, total)
    bands = {f"validation_loss_band_{number}": loss * share for number, share in enumerate(BANDS, 1)}
    return json.dumps({"step": step, "validation_loss": loss, **bands})


def write_previews(
    folder: Path, step: int, noise: float, prompts: Sequence[str] = PROMPTS, size: tuple[int, int] = (512, 384)
) -> None:
    """Write the previews of a step: photographs that appear from a share of noise."""
    out = preview_folder(folder, step)
    out.mkdir(parents=True)
    images = []
    for number, prompt in enumerate(prompts):
        photograph = getattr(skimage.data, DRAWN[number % len(DRAWN)])()[..., :3]
        pixels = np.asarray(Image.fromarray(photograph).resize(size))
        drawn = np.random.default_rng((step, number)).integers(0, 256, pixels.shape)
        file = f"{number + 1:04d}.png"
        Image.fromarray((pixels * (1 - noise) + drawn * noise).astype(np.uint8)).save(out / file, compress_level=1)
        images.append(PreviewImage(file, prompt, number, size[1], size[0], 1))
    PreviewList(step, tuple(images)).save(out)
