"""`generate` from end to end on tiny weights: images, clips, edits, LoRAs, checkpoints, grids, runs, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from diffsynth_cli.main import main
from diffsynth_core.data.videos import load_clip
from tests.conftest import ENTRIES
from tests.loras import random_lora, save_lora
from tests.outcome import Outcome

SMALL = ("--device", "cpu", "--height", "64", "--width", "64", "--steps", "2")
QWEN = ("--recipe", "qwen-image-lora", *SMALL)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def draw(cli: Callable[..., Outcome], *arguments: object) -> list[Path]:
    """Draw, and return the paths on stdout."""
    outcome = cli("generate", *arguments)
    assert outcome.code == 0, outcome.err
    paths = [Path(line) for line in outcome.out.splitlines()]
    assert all(path.is_file() for path in paths)
    assert not list(paths[0].parent.glob(".*")), "no temporary file is left"
    return paths


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a rehearsal with two checkpoints."""
    folder = tmp_path_factory.mktemp("rehearsed")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "--recipe", "qwen-image-lora", "--rehearse", "--save_steps", "4", "--device", "cpu"]) == 0
    finally:
        os.chdir(before)
    (run,) = (folder / "rehearsals").iterdir()
    return run


def test_the_checkpoints_of_a_run_side_by_side(cli, rehearsed):
    *images, sheet = draw(cli, "--run", rehearsed, "--grid", *SMALL)
    assert [path.name for path in images] == [f"{number:04}.png" for number in range(1, 13)]
    assert sheet == Path("generated") / rehearsed.name / "grid.png"
    base, early, late = map(pixels, images[:3])
    assert (base != early).any() and (early != late).any()
    described = json.loads(Image.open(images[2]).info["diffsynth"])
    (lora,) = described["loras"]
    assert (lora["file"], lora["weight"]) == (str(rehearsed / "step-8.safetensors"), 1)
    assert len(lora["sha256"]) == 64
    # The same from the files: the last checkpoint with two weights, in a grid of its own.
    again = draw(cli, "--run", rehearsed, "--lora", f"{rehearsed / 'step-8.safetensors'}:0,1", "--grid", "--out", "again",
                 "--prompt", described["prompt"], *SMALL)  # fmt: skip
    assert [path.name for path in again] == ["0001.png", "0002.png", "grid.png"]
    assert (pixels(again[0]) == base).all() and (pixels(again[1]) == late).all()
    shown = Image.open(again[2])
    cell = np.asarray(shown.crop((shown.width - 8 - 192, shown.height - 8 - 192, shown.width - 8, shown.height - 8)))
    assert (cell[::3, ::3] == late).all(), "64 pixels are shown as 192"


def test_the_last_checkpoint_and_the_captions_of_a_run(cli, rehearsed):
    images = draw(cli, "--run", rehearsed, *SMALL)
    facts = [json.loads(Image.open(path).info["diffsynth"]) for path in images]
    assert [one["seed"] for one in facts] == [0, 1, 2, 3] and len({one["prompt"] for one in facts}) == 4
    assert {one["loras"][0]["file"] for one in facts} == {str(rehearsed / "step-8.safetensors")}


def test_an_image_has_its_parameters(cli):
    (path,) = draw(
        cli, *QWEN, "--prompt", "a ☂ on\nwater", "--negative_prompt", "rain", "--seed", 7, "--cfg_scale", 2.5
    )
    image = Image.open(path)
    assert (image.size, image.mode) == ((64, 64), "RGB")
    first, second, negative, facts = image.info["parameters"].split("\n")
    assert [first, second, negative] == ["a ☂ on", "water", "Negative prompt: rain"]
    assert facts.startswith("Steps: 2, CFG scale: 2.5, Seed: 7, Size: 64x64, Model: Qwen-Image")
    described = json.loads(image.info["diffsynth"])
    assert described["prompt"] == "a ☂ on\nwater" and described["family"] == "qwen-image"
    text_encoder = described["components"]["text_encoder"]
    assert text_encoder["source"] == ENTRIES["text_encoder"]
    assert [len(one["sha256"]) for one in text_encoder["files"]] == [64], "encoding has hashed it"


def test_prompts_are_encoded_once_and_seeds_follow_each_other(cli, tmp_path):
    table = tmp_path / "prompts.txt"
    table.write_text("a fox in snow\n\na hare\n")
    first = draw(cli, *QWEN, "--prompts", table, "--seed", 5)
    outcome = cli("generate", *QWEN, "--prompt", "a hare", "--seed", 6, "--out", "again")
    assert outcome.code == 0 and "Encoding" not in outcome.err and "Loading text_encoder" not in outcome.err
    assert (pixels(Path("again/0001.png")) == pixels(first[1])).all()


def test_a_lora_draws_as_its_merged_checkpoint(cli, tiny_families, tiny_models, tmp_path):
    shapes = tiny_families("qwen-image").module_shapes()
    lora = save_lora(tmp_path / "style.safetensors", random_lora(shapes, spread=0.2), "qwen-image", "kohya")
    merging = cli("merge-lora", "--base", ENTRIES["dit"], "--lora", f"{lora}:0.5", "--dtype", "float32",
                  "--output_path", tmp_path / "merged")  # fmt: skip
    assert merging.code == 0, merging.err
    (merged,) = (tmp_path / "merged").glob("*.safetensors")
    (tmp_path / "merged" / "config.json").unlink(missing_ok=True)  # that of the recipe's files counts
    plain = draw(cli, *QWEN, "--prompt", "a cat", "--out", "plain")[0]
    adapted = draw(cli, *QWEN, "--prompt", "a cat", "--lora", f"{lora}:0.5", "--out", "lora")[0]
    full = draw(cli, *QWEN, "--prompt", "a cat", "--checkpoint", merged, "--out", "full")[0]
    assert np.abs(pixels(adapted) - pixels(full)).max() <= 1
    assert np.abs(pixels(adapted) - pixels(plain)).max() > 20
    source = json.loads(Image.open(full).info["diffsynth"])["components"]["dit"]
    assert source["source"] == str(merged)
    stored = draw(
        cli, *QWEN, "--prompt", "a cat", "--lora", f"{lora}:0.5", "--fp8_models", ENTRIES["dit"], "--out", "f8"
    )
    near, far = (np.abs(pixels(stored[0]) - pixels(other)).mean() for other in (adapted, plain))
    assert 0 < near < far / 2, "the LoRA is not rounded to 8 bits"


def test_an_edit(cli, recipe_models, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("qwen-image-edit-2509-lora")))
    table = tmp_path / "edits.csv"
    rows = ["prompt,edit_image,seed"]
    for color in ("red", "blue"):
        Image.new("RGB", (64, 96), color).save(tmp_path / f"{color}.png")
        rows.append(f"add a hat,{color}.png,3")
    rows.append('add a hat,"[""red.png"", ""blue.png""]",3')
    table.write_text("\n".join(rows))
    images = draw(cli, "--recipe", "qwen-image-edit-2509-lora", *SMALL, "--max_pixels", 4096, "--prompts", table)
    red, blue, both = map(pixels, images)
    assert (red != blue).any() and (red != both).any()
    described = json.loads(Image.open(images[2]).info["diffsynth"])
    assert [Path(one["file"]).name for one in described["images"]["edit_image"]] == ["red.png", "blue.png"]
    assert all(len(one["sha256"]) == 64 for one in described["images"]["edit_image"])


@pytest.mark.video
def test_a_clip(cli, recipe_models, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("wan2.1-t2v-1.3b-lora")))
    small = ("--device", "cpu", "--height", 32, "--width", 48, "--num_frames", 5, "--steps", 2)
    clip, sheet = draw(cli, "--recipe", "wan2.1-t2v-1.3b-lora", *small, "--prompt", "rain; on = a # roof", "--grid")
    assert clip.name == "0001.mp4" and Image.open(sheet).height > 32
    assert load_clip(clip, 0, 5, 32, 48, None).shape == (5, 32, 48, 3)
    said = subprocess.run([get_ffmpeg_exe(), "-i", clip, "-f", "ffmetadata", "-"], capture_output=True, text=True)
    assert "16 fps" in said.stderr
    assert "rain\\; on \\= a \\# roof" in said.stdout and '"num_frames": 5' in said.stdout.replace("\\", "")


def test_ctrl_c_leaves_whole_images(tiny_models, tmp_path):
    prompts = [word for number in range(40) for word in ("--prompt", f"image {number}")]
    command = [sys.executable, "-m", "diffsynth_cli", "generate", *QWEN, *prompts, "--out", "out"]
    environment = os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, until = tmp_path / "out", time.monotonic() + 240
    while not (out / "0002.png").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=240)
    images = sorted(out.iterdir())
    assert process.returncode == 130, errors
    assert 2 <= len(images) < 40 and [path.name for path in images] == [
        f"{n:04}.png" for n in range(1, len(images) + 1)
    ]
    assert said.splitlines() == [f"out/{path.name}" for path in images]
    assert all(pixels(path).shape == (64, 64, 3) for path in images)
    assert f"{len(images)} of 40 images are in `out`" in errors
