"""Build the tiny model that is shipped: `python -m tests.shapes.build FOLDER`, or `make tiny-model`.

Everything depends on the seeds in these scripts and on the arithmetic of the machine alone: with one thread per
process, a second build on the same machine gives the same bytes.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from diffsynth_core.hub.model_folder import shipped_folder
from tests.shapes.datasets import scene_rows, write_dataset
from tests.shapes.scenes import draw_scenes
from tests.shapes.train_vae import train_vae
from tests.shapes.untrained import FILES, MODEL_ID, write_untrained


class Amounts(NamedTuple):
    """How much of everything.

    Attributes:
        vae_steps, decoder_steps: optimizer steps of both halves of the VAE, then of the decoder alone.
        images, epochs: of the training of the transformer.
    """

    vae_images: int = 6000
    vae_steps: int = 4500
    decoder_steps: int = 4500
    images: int = 8000
    epochs: int = 27


FULL = Amounts()
"""Those of the shipped model."""


def build(folder: Path, amounts: Amounts = FULL) -> Path:
    """Build the model below a new folder and return its path."""
    model = folder / MODEL_ID
    with timed("text encoder, tokenizer"):
        write_untrained(folder)
    with timed("VAE"):
        train_vae(amounts.vae_images, amounts.vae_steps, amounts.decoder_steps).to(torch.bfloat16).save_pretrained(
            model / "vae"
        )
    with timed("dataset"):
        write_dataset(folder / "dataset", scene_rows(draw_scenes(amounts.images, seed=0)))
    with timed("transformer"):
        train_transformer(folder, model, amounts.epochs)
    return model


def train_transformer(folder: Path, model: Path, epochs: int) -> None:
    """Train the transformer in place with the recipe `shapes-full`."""
    output = folder / "training"
    command = [sys.executable, "-m", "diffsynth_cli", "train", "--recipe", "shapes-full", "--device", "cpu"]
    command += ["--model_paths", json.dumps([str(model / name) for name in FILES.values()])]
    command += ["--dataset_base_path", str(folder / "dataset"), "--cache_path", str(folder / "cache")]
    command += ["--output_path", str(output), "--save_dtype", "bfloat16", "--num_epochs", str(epochs)]
    subprocess.run(command, check=True)
    shutil.copyfile(output / f"epoch-{epochs - 1}.safetensors", model / FILES["dit"])


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how many minutes a part took."""
    begun = time.monotonic()
    yield
    print(f"{what}: {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)


def compare(model: Path, shipped: Path) -> None:
    """Print for each file whether the shipped model has the same bytes."""
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        other = shipped / path.relative_to(model)
        content = path.read_bytes()
        same = other.is_file() and other.read_bytes() == content
        shown = f"{path.relative_to(model)}  {hashlib.sha256(content).hexdigest()[:16]}"
        print(f"{shown}  {'as shipped' if same else 'not as shipped'}")


def main() -> None:
    """Build, then compare with the shipped model."""
    parser = argparse.ArgumentParser(description="Build the tiny model that is shipped with the recipes.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    torch.set_num_threads(1)
    model = build(folder)
    compare(model, shipped_folder(MODEL_ID))
    print(model)


if __name__ == "__main__":
    main()
