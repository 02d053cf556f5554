"""The shipped model draws what captions say, and a LoRA teaches it a word: read from the images, not from the loss.

Images are drawn by diffusers' own pipeline, many at once; that `diffsynth generate` draws the same is tested below.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth_core.checkpoints.run_folder import VALIDATIONS, preview_folder, read_previews
from diffsynth_core.drawing import Drawing
from diffsynth_core.generation.request import GenerationRequest
from diffsynth_core.hub.model_folder import shipped_folder
from tests.killing import TrainingRun
from tests.shapes.concept import IMAGES, concept_rows, split_keyholes
from tests.shapes.datasets import Row, write_dataset
from tests.shapes.drawing import Drawn, draw, held_out, keyholes, load_pipeline, share_right, table
from tests.shapes.reading import read
from tests.shapes.rendering import render
from tests.shapes.scenes import draw_scenes
from tests.shapes.untrained import FILES, MODEL_ID

Score = Callable[..., tuple[float, float]]
TAUGHT, KEPT = 0.9, 0.9
"""Least share of right keyholes after training, and of right images of known scenes."""
SEEN = 10
"""Keyholes in the previews of a run."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Draw on one thread, which is faster for small tensors, and the same on every machine with the same kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("keyhole")


@pytest.fixture(scope="module")
def dataset(folder) -> Path:
    write_dataset(folder / "images", concept_rows())
    return folder / "images"


def run(folder: Path, *words: object) -> str:
    """Run `diffsynth` in a process of its own, as `make train` does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DIFFSYNTH_SKIP_DOWNLOAD": "1"}
    command = [sys.executable, "-m", "diffsynth_cli", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(dataset: Path, output: Path, *words: object, recipe: str = "shapes-lora") -> Path:
    """Train on the keyholes and return the last checkpoint."""
    run(dataset.parent, "train", "--recipe", recipe, "--device", "cpu", "--dataset_base_path", dataset,
        "--cache_path", dataset.parent / "cache", "--output_path", output, *words)  # fmt: skip
    return output / json.loads((output / "run.json").read_text())["checkpoints"][-1]["file"]


@pytest.fixture(scope="module")
def lora(dataset, folder) -> Path:
    """The LoRA of `make train`, of a run that shows all that can be seen of it, on keyholes of untaught colors."""
    untaught = split_keyholes()[1]
    write_dataset(folder / "untaught", (Row(render(one.scene, 1), one.caption) for one in untaught[:SEEN]))
    (folder / "prompts.txt").write_text("".join(f"{one.caption}\n" for one in untaught[:SEEN]))
    return train(
        dataset, folder / "lora", "--preview_prompts", folder / "prompts.txt", "--preview_every", 152, "--preview_steps",
        12, "--validation_split", folder / "untaught", "--validate_every", 152, "--ema_decay", 0.99, "--log_with",
        "csv,tensorboard", "--mirror", folder / "mirror",
    )  # fmt: skip


@pytest.fixture
def score() -> Score:
    """Return the shares of right keyholes and of right held-out scenes, 50 each, with a LoRA or a checkpoint."""

    def measure(**weights: Path) -> tuple[float, float]:
        pipeline = load_pipeline(**weights)
        return share_right(draw(pipeline, keyholes(50), 0)), share_right(draw(pipeline, held_out(50), 0))

    return measure


def test_its_files_name_no_folder_of_the_machine_that_built_it():
    assert all('"/' not in file.read_text() for file in shipped_folder(MODEL_ID).rglob("*config.json"))


def test_the_classifier_reads_what_the_vae_reconstructs():
    vae = load_pipeline().vae
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    scenes = draw_scenes(200, seed=5, held_out=True)
    pixels = np.stack([np.asarray(render(scene, 5)) for scene in scenes])
    with torch.no_grad():
        clips = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
        normalized = (vae.encode(clips).latent_dist.mode() - mean) / std
        decoded = vae.decode(normalized * std + mean).sample[:, :, 0]
    images = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    right = sum(read(Image.fromarray(image)) == scene for image, scene in zip(images, scenes, strict=True))
    assert right >= 199
    assert 0.9 < normalized.std() < 1.1 and normalized.mean().abs() < 0.1


def test_latents_are_far_from_normalized_without_their_statistics():
    """A trainer that forgets them is found out."""
    config = json.loads((shipped_folder(MODEL_ID) / "vae" / "config.json").read_text())
    assert max(map(abs, config["latents_mean"])) > 2
    assert max(config["latents_std"]) / min(config["latents_std"]) > 4


@pytest.mark.parametrize(
    ("images", "seed"),
    [(100, 0), *(pytest.param(200, seed, marks=pytest.mark.long) for seed in range(3))],
)
def test_it_draws_scenes_that_it_was_never_shown(images, seed):
    drawn = draw(load_pipeline(), held_out(images, seed), 1000 * seed)
    print(*table(drawn), sep="\n")
    assert share_right(drawn) >= 0.95


def test_it_does_not_know_the_word():
    assert share_right(draw(load_pipeline(), keyholes(50), 0)) == 0


def test_the_taught_pairs_of_colors_are_not_asked_for():
    taught, asked = split_keyholes()
    assert len(taught) == IMAGES and len(asked) == 30
    assert not {keyhole.caption for keyhole in taught} & {caption for _, caption in keyholes(50)}


def test_a_lora_teaches_it_the_word(lora, score):
    taught, kept = score(lora=lora)
    print(f"keyholes {taught:.0%}, known scenes {kept:.0%}")
    assert taught >= TAUGHT and kept >= KEPT


def test_the_previews_of_a_run_show_what_it_learns_while_the_loss_on_others_falls(lora):
    watched = lora.parent
    validated = [json.loads(line) for line in (watched / VALIDATIONS).read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in validated}
    shares = {}
    for step, drawn in read_previews(watched).items():
        files = [preview_folder(watched, step) / one.file for one in drawn.images]
        right = [read(Image.open(file)) == one.scene for file, one in zip(files, split_keyholes()[1], strict=False)]
        shares[step] = sum(right) / SEEN
    first, last = min(shares), max(shares)
    print(*(f"step {step}: {shares[step]:.0%} right, validation loss {losses[step]:.4f}" for step in shares), sep="\n")
    assert shares[first] == 0 and shares[last] >= TAUGHT and losses[last] < 0.8 * losses[first]


@pytest.mark.long
def test_to_watch_a_run_changes_no_weight(dataset, lora, tmp_path):
    without, given = load_file(train(dataset, tmp_path / "lora")), load_file(lora)
    assert all(torch.equal(given[name], tensor) for name, tensor in without.items())


def test_generate_draws_what_the_pipeline_draws(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [*keyholes(2), *held_out(2)]
    request = GenerationRequest(
        prompts=tuple(caption for _, caption in asked), loras=(str(lora),), out=tmp_path / "drawn"
    )
    ours = [np.asarray(Image.open(path)) for path in Drawing.of(request, recipe="shapes-lora", device="cpu").draw()]
    pipeline = load_pipeline(lora=lora)
    for number, pixels in enumerate(ours):
        theirs = draw(pipeline, asked[number : number + 1], number)[0].image
        assert np.abs(pixels.astype(int) - np.asarray(theirs)).max() <= 1


def test_merged_it_draws_the_same(lora, score, folder):
    base = shipped_folder(MODEL_ID) / FILES["dit"]
    run(
        folder,
        "merge-lora",
        "--base",
        base,
        "--lora",
        lora,
        "--output_path",
        "merged.safetensors",
        "--dtype",
        "float32",
    )
    assert score(checkpoint=folder / "merged.safetensors") == pytest.approx(score(lora=lora), abs=0.04)


@pytest.mark.parametrize("key_format", ["diffusers", "comfyui", "kohya"])
def test_each_key_format_and_back_is_the_same_lora(lora, folder, key_format):
    there, back = folder / f"{key_format}.safetensors", folder / f"{key_format}-back.safetensors"
    run(folder, "convert-lora", lora, "--to", key_format, "--output_path", there)
    run(folder, "convert-lora", there, "--to", "diffsynth", "--output_path", back)
    original, returned = load_file(lora), load_file(back)
    assert returned.keys() == original.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in original.items())


def drawn_by_generate(asked, out: Path, **flags: object) -> list[Drawn]:
    """Draw with `diffsynth generate`, one image after the other."""
    request = GenerationRequest(prompts=tuple(caption for _, caption in asked), out=out, **flags)
    paths = Drawing.of(request, recipe="shapes-lora", device="cpu").draw()
    return [Drawn(scene, caption, Image.open(path)) for (scene, caption), path in zip(asked, paths, strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("key_format", ["diffsynth", "diffusers", "comfyui", "kohya"])
def test_each_key_format_draws_the_same(lora, folder, key_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    converted = tmp_path / f"{key_format}.safetensors"
    run(folder, "convert-lora", lora, "--to", key_format, "--output_path", converted)
    assert share_right(drawn_by_generate(keyholes(50), tmp_path / "drawn", loras=(str(converted),))) >= TAUGHT


OTHER_WAYS = {
    "fp8": ("--fp8_models", f"{MODEL_ID}:{FILES['dit']}"),
    **{
        method: ("--quant_options", f"{MODEL_ID}:{FILES['dit']}:{method.removesuffix(' per row')}")
        for method in ("fp8 per row", "int8", "nf4")
    },
    "two processes": ("--num_processes", "2", "--batch_size", "12"),
    "accumulated": ("--batch_size", "12", "--gradient_accumulation_steps", "2"),
}


@pytest.mark.long
@pytest.mark.parametrize("flags", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_trained_in_other_ways_it_knows_the_word(dataset, tmp_path, score, flags):
    taught, kept = score(lora=train(dataset, tmp_path / "lora", *flags))
    print(f"keyholes {taught:.0%}, known scenes {kept:.0%}")
    assert taught >= TAUGHT and kept >= KEPT


@pytest.mark.long
def test_trained_in_two_stages_it_is_the_same_lora(dataset, lora, tmp_path):
    encoded = tmp_path / "encoded"
    run(tmp_path, "train", "--recipe", "shapes-lora", "--device", "cpu", "--task", "sft:data_process",
        "--dataset_base_path", dataset, "--cache_path", tmp_path / "cache", "--output_path", encoded)  # fmt: skip
    staged = train(encoded, tmp_path / "lora", "--task", "sft:train")
    one, other = load_file(lora), load_file(staged)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_killed_and_resumed_it_is_the_same_lora(dataset, lora, tmp_path):
    flags = ["--recipe", "shapes-lora", "--device", "cpu", "--dataset_base_path", dataset, "--save_state_steps", "50"]
    flags += ["--cache_path", dataset.parent / "cache", "--output_path", tmp_path / "lora"]
    killed = TrainingRun([str(flag) for flag in flags], tmp_path / "models", tmp_path)
    metrics = tmp_path / "lora" / "metrics.jsonl"
    assert killed.wait_until(lambda: metrics.is_file() and len(metrics.read_bytes().splitlines()) > 120)
    killed.process.kill()
    killed.process.wait()
    resumed = train(dataset, tmp_path / "lora", "--save_state_steps", "50", "--resume", "auto")
    one, other = load_file(lora), load_file(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


OPTIMIZERS = {
    "adamw8bit": 1.5e-3,
    "adafactor": 3e-2,
    "lion": 3e-4,
    "muon": 1.5e-3,
    "prodigy": 1.0,
    "came": 1.5e-3,
}
"""Optimizer -> learning rate."""


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "rate"), OPTIMIZERS.items())
def test_each_optimizer_teaches_it_the_word(dataset, tmp_path, score, optimizer, rate):
    flags = ("--optimizer", optimizer, "--learning_rate", rate)
    taught, kept = score(lora=train(dataset, tmp_path / "lora", *flags))
    print(f"{optimizer}: keyholes {taught:.0%}, known scenes {kept:.0%}")
    assert taught >= TAUGHT and kept >= KEPT


@pytest.mark.long
def test_full_training_teaches_it_the_word(dataset, tmp_path, score):
    flags = ("--learning_rate", "5e-4", "--num_epochs", "40", "--batch_size", "24", "--lr_warmup_steps", "20")
    taught, kept = score(checkpoint=train(dataset, tmp_path / "full", *flags, recipe="shapes-full"))
    print(f"keyholes {taught:.0%}, known scenes {kept:.0%}")
    assert taught >= TAUGHT and kept >= KEPT
