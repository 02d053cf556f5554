"""`generate` from end to end on tiny weights: images, clips, edits, LoRAs, checkpoints, grids, runs, Ctrl-C."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_cli.main import main
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.data.videos import load_clip
from diffsynth_core.generation import labels
from tests.clips import detailed, write_clip
from tests.conftest import ENTRIES, MODEL_ID, PLACES
from tests.killing import ForkedRun
from tests.loras import random_lora, save_lora
from tests.outcome import Outcome
from tests.recorded_runs import record_run
from tests.wan import I2V
from tests.wan import PLACES as PLACES_OF_WAN

SMALL = ("--device", "cpu", "--height", "64", "--width", "64", "--steps", "2")
QWEN = ("--recipe", "qwen-image-lora", *SMALL)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def described(path: Path) -> dict[str, Any]:
    """Return what the metadata of an image says as JSON."""
    with Image.open(path) as image:
        return json.loads(image.info["diffsynth"])


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
    (lora,) = described(images[2])["loras"]
    assert (lora["file"], lora["weight"]) == ("step-8.safetensors", 1)
    assert len(lora["sha256"]) == 64
    # The same from the files: the last checkpoint with two weights, in a grid of its own.
    again = draw(cli, "--run", rehearsed, "--lora", f"{rehearsed / 'step-8.safetensors'}:0,1", "--grid", "--out", "again",
                 "--prompt", described(images[2])["prompt"], *SMALL)  # fmt: skip
    assert [path.name for path in again] == ["0001.png", "0002.png", "grid.png"]
    assert (pixels(again[0]) == base).all() and (pixels(again[1]) == late).all()
    cell = pixels(again[2])[-200:-8, -200:-8]
    assert (cell[::3, ::3] == late).all(), "64 pixels are shown as 192"


def test_the_last_checkpoint_and_the_captions_of_a_run(cli, rehearsed):
    images = draw(cli, "--run", rehearsed, *SMALL)
    facts = [described(path) for path in images]
    assert [one["seed"] for one in facts] == [0, 1, 2, 3] and len({one["prompt"] for one in facts}) == 4
    assert {one["loras"][0]["file"] for one in facts} == {"step-8.safetensors"}


def test_an_image_has_its_parameters(cli):
    (path,) = draw(
        cli, *QWEN, "--prompt", "a ☂ on\nwater", "--negative_prompt", "rain", "--seed", 7, "--cfg_scale", 2.5
    )
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
        first, second, negative, facts = image.info["parameters"].split("\n")
    assert [first, second, negative] == ["a ☂ on", "water", "Negative prompt: rain"]
    assert facts.startswith("Steps: 2, CFG scale: 2.5, Seed: 7, Size: 64x64, Model: Qwen-Image")
    content = described(path)
    assert content["prompt"] == "a ☂ on\nwater" and content["family"] == "qwen-image"
    text_encoder = content["components"]["text_encoder"]
    assert text_encoder["source"] == ENTRIES["text_encoder"]
    assert all(len(one["sha256"]) == 64 for one in text_encoder["files"]), "encoding has hashed it"


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
    merged = tmp_path / "merged"
    assert not (merged / "config.json").exists(), "that of the recipe's files counts"
    plain = draw(cli, *QWEN, "--prompt", "a cat", "--out", "plain")[0]
    adapted = draw(cli, *QWEN, "--prompt", "a cat", "--lora", f"{lora}:0.5", "--out", "lora")[0]
    full = draw(cli, *QWEN, "--prompt", "a cat", "--checkpoint", merged, "--out", "full")[0]
    assert np.abs(pixels(adapted) - pixels(full)).max() <= 1
    assert np.abs(pixels(adapted) - pixels(plain)).max() > 20
    assert described(full)["components"]["dit"]["source"] == merged.name, "no path of this machine"
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
    shown = described(images[2])["images"]["edit_image"]
    assert [one["file"] for one in shown] == ["red.png", "blue.png"]
    assert all(len(one["sha256"]) == 64 for one in shown)


@pytest.mark.video
def test_a_clip(cli, recipe_models, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("wan2.1-t2v-1.3b-lora")))
    small = ("--device", "cpu", "--height", 32, "--width", 48, "--num_frames", 5, "--steps", 2)
    clip, sheet = draw(cli, "--recipe", "wan2.1-t2v-1.3b-lora", *small, "--prompt", "rain; on = a # roof", "--grid")
    assert clip.name == "0001.mp4" and len(pixels(sheet)) > 32
    assert load_clip(clip, 0, 5, 32, 48, None).shape == (5, 32, 48, 3)
    said = subprocess.run([get_ffmpeg_exe(), "-i", clip, "-f", "ffmetadata", "-"], capture_output=True, text=True)
    assert "16 fps" in said.stderr
    assert "rain\\; on \\= a \\# roof" in said.stdout and '"num_frames": 5' in said.stdout.replace("\\", "")


@pytest.mark.video
def test_a_run_with_conditioning_frames_gives_them_with_its_captions(
    cli, tiny_wan, tiny_families, monkeypatch, tmp_path
):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))
    clips = tmp_path / "clips"
    clips.mkdir()
    frames = detailed(9, 32, 48)
    write_clip(clips / "a.mov", frames)
    Image.fromarray(frames[0]).save(clips / "b.png")
    Image.fromarray(frames[8]).save(tmp_path / "last.png")
    (clips / "metadata.csv").write_text("video,prompt\na.mov,rain\nb.png,rain and wind\n")
    save_lora(
        tmp_path / "style.safetensors",
        random_lora(tiny_families("wan").module_shapes(), spread=0.2),
        "wan",
        "diffusers",
    )
    recorded = {
        "model_id_with_origin_paths": [f"{I2V}:{place}" for place in PLACES_OF_WAN[I2V].values()],
        "extra_inputs": ["input_image"], "height": 32, "width": 48, "num_frames": 5,
    }  # fmt: skip
    run = record_run(tmp_path / "run", clips, "wan", **recorded)
    few = ("--device", "cpu", "--steps", 1, "--seed", 3)
    outcome = cli("generate", "--run", run, *few, "--dry_run", "--format", "json")
    assert [one["images"] for one in json.loads(outcome.out)["images"]] == [
        {"input_image": [str(clips / "a.mov")]}, {"input_image": [str(clips / "b.png")]},
    ]  # fmt: skip

    def clip(path):
        return load_clip(path, 0, 5, 32, 48, None)

    first, _ = map(clip, draw(cli, "--run", run, *few))
    given = ("--run", run, *few, "--prompt", "rain", "--out")
    (same,) = draw(cli, *given, "same", "--input_image", clips / "b.png")
    assert (first == clip(same)).all(), "the first frame of the clip"
    (mine, _) = draw(cli, "--run", run, *few, "--out", "mine", "--input_image", tmp_path / "last.png")
    (other,) = draw(cli, *given, "other", "--input_image", tmp_path / "last.png")
    assert (clip(mine) == clip(other)).all() and (clip(mine) != first).any(), "what is given goes before the dataset"


@pytest.mark.long
def test_full_checkpoints_of_a_run_side_by_side(cli, tiny_models, photographs, monkeypatch, tmp_path):
    weights = {}
    for path in (tiny_models / MODEL_ID).glob(PLACES["dit"]):
        weights |= load_file(path)
    for number in range(2):
        changed = {name: tensor * (1 + number / 10) for name, tensor in weights.items()}
        save_file(changed, tmp_path / f"epoch-{number}.safetensors")
    run = record_run(tmp_path / "run", photographs, lora_base_model=None, trainable_models=["dit"])
    monkeypatch.setattr(labels, "FONT_FILES", ())
    outcome = cli("generate", "--run", run, "--grid", "--prompt", "a cat", "--prompt", "a dog, 犬", *SMALL)
    assert outcome.code == 0 and "no font here has 1 character of the labels (`犬`)" in outcome.err
    *images, sheet = map(Path, outcome.out.splitlines())
    assert [path.name for path in (*images, sheet)] == [
        "0001.png", "0004.png", "0002.png", "0005.png", "0003.png", "0006.png", "grid.png",
    ]  # fmt: skip
    base, _, same, _, other, _ = map(pixels, images)
    assert (base == same).all() and (base != other).any()
    assert described(images[4])["components"]["dit"]["source"] == "epoch-1.safetensors"


class DrawingRun(ForkedRun):
    """`diffsynth generate` in a process forked from this one."""

    command = "generate"


def test_ctrl_c_leaves_whole_images(cli, tiny_models, tmp_path):
    draw(cli, *QWEN, "--prompt", "image 0")  # imports everything
    prompts = [word for number in range(200) for word in ("--prompt", f"image {number}")]
    folder, out = tmp_path / "forked", tmp_path / "forked" / "out"
    folder.mkdir()
    with DrawingRun([*QWEN, *prompts, "--out", "out"], tiny_models, folder) as run:
        assert run.wait_until(lambda: (out / "0002.png").exists()), run.stderr()
        os.kill(run.process.pid, signal.SIGINT)
        code = run.process.wait()
        said = run.stderr()
    images = sorted(out.iterdir())
    assert code == 130, said
    assert 2 <= len(images) < 200
    assert [path.name for path in images] == [f"{number:04}.png" for number in range(1, len(images) + 1)]
    assert all(pixels(path).shape == (64, 64, 3) for path in images)
    assert [line for line in said.splitlines() if line.endswith(".png")] == [f"out/{path.name}" for path in images]
    assert f"{len(images)} of 200 images are in `out`" in said


@pytest.mark.long
def test_both_transformers_of_wan_2_2(cli, recipe_models, entry_models, tiny_families, monkeypatch, tmp_path):
    """Stages of a recipe are the two denoisers of one model; each has LoRAs of its own."""
    recipe = "wan2.2-t2v-a14b-lora"
    stages = resolve_stages({"recipe": recipe})
    base = entry_models(*(entry for one in stages for entry in one.parameters.model_id_with_origin_paths))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))
    shapes = tiny_families("wan").module_shapes()
    lora = save_lora(tmp_path / "style.safetensors", random_lora(shapes, spread=0.3), "wan", "diffsynth")
    small = ("--recipe", recipe, "--device", "cpu", "--height", 32, "--width", 48, "--num_frames", 1, "--steps", 4,
             "--prompt", "rain")  # fmt: skip
    cases = {
        "plain": (), "high": ("--only", "high"), "first": ("--lora", lora), "second": ("--lora_dit2", lora),
        "neither": ("--lora", f"{lora}:0", "--lora_dit2", f"{lora}:0"),
    }  # fmt: skip
    drawn = {name: pixels(draw(cli, *small, *words, "--out", name)[0]) for name, words in cases.items()}
    assert (drawn["plain"] == drawn["neither"]).all()
    different = [drawn[name] for name in ("plain", "high", "first", "second")]
    assert all((one != other).any() for one, other in combinations(different, 2))
    content = described(Path("plain/0001.png"))["components"]
    assert "high_noise_model" in content["dit"]["source"] and "low_noise_model" in content["dit2"]["source"]
