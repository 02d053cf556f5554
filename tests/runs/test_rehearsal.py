"""Rehearsals of every recipe, on synthetic images and on the user's own, through the real files and the real
command.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffsynth_core.config.recipes import load_recipe, recipe_names
from diffsynth_core.data.synthetic_images import DRAWN
from tests.conftest import ENTRIES, MODEL_ID
from tests.documented_recipes import PRESETS

PROOFS = {
    "qwen-image": (
        "each of its 42 keys matches one of 21 modules of dit",
        "all 77 tensors of dit are in the checkpoint",
    ),
    "wan2.1-i2v": (
        "each of its 40 keys matches one of 20 modules of dit",
        "all 87 tensors of dit are in the checkpoint",
    ),
    "wan": ("each of its 40 keys matches one of 20 modules of dit", "all 69 tensors of dit are in the checkpoint"),
    "flux.1": ("each of its 78 keys matches one of 26 modules of dit", "all 84 tensors of dit are in the checkpoint"),
    "flux.2-klein-4b": (
        "each of its 128 keys matches one of 64 modules",
        "all 121 tensors of dit are in the checkpoint",
    ),
    "flux.2-klein-base-4b": (
        "each of its 128 keys matches one of 64 modules",
        "all 121 tensors of dit are in the checkpoint",
    ),
    "shapes": ("each of its 90 keys matches one of 45 modules of dit", "all 141 tensors of dit are in the checkpoint"),
    "flux.2": ("each of its 144 keys matches one of 72 modules of dit", "all 137 tensors of dit are in the checkpoint"),
}
"""Prefix of recipe names -> what a rehearsal proves; the first match."""


LIKE_OTHERS = (
    *("flux.1-krea-dev", "flux.2-klein-9b", "flux.2-klein-base-4b", "flux.2-klein-base-9b", "qwen-image-2512"),
    *("flux.1-kontext-dev-full", "flux.2-klein-4b-full", "qwen-image-edit", "qwen-image-edit-2509-full"),
    *("qwen-image-edit-2511", "wan2.1-t2v-14b", "wan2.1-i2v-14b-480p-full", "wan2.1-i2v-14b-720p", "wan2.2-i2v-a14b"),
    "wan2.2-t2v-a14b-full",  # the model of wan2.1-t2v-1.3b-full in the stages of wan2.2-t2v-a14b-lora
)
"""Recipes, or models of which both recipes are meant, that differ from another one only in name and size: variant, what
is trained and how, and stages are rehearsed with the others. `make test-all` rehearses them too."""
QUICK_PRESETS = ("qwen-image-lora-12gb", "qwen-image-full-24gb")
"""Recipes for GPUs of one size that are rehearsed at each change."""


def recipes() -> Iterator[Any]:
    for name in recipe_names():
        model = name.removesuffix("-lora").removesuffix("-full")
        long = {name, model} & {*LIKE_OTHERS} or (name in PRESETS and name not in QUICK_PRESETS)
        yield pytest.param(name, marks=[pytest.mark.long] if long else [])


@pytest.mark.parametrize("recipe", list(recipes()))
def test_every_recipe_rehearses(cli, recipe):
    outcome = cli("train", "--recipe", recipe, "--rehearse", "--dataset_num_workers", 0, "--batch_size", 1)
    assert outcome.code == 0, outcome.err
    stages = load_recipe(recipe).stages or (None,)
    reduced = 0 if recipe.startswith("shapes-") else len(stages)  # as small as they can be
    assert outcome.err.count("The rehearsal runs at a small size: ") == reduced
    assert outcome.out.count("stopped after step 4, resumed, and finished at step 8") == len(stages)
    for stage in stages:
        folder = Path("rehearsals", f"{recipe}-{stage}-1" if stage else f"{recipe}-1")
        assert f"Metrics     {folder}/metrics.jsonl" in outcome.out
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"], record["step"]) == ("completed", 8)
        assert [entry["file"] for entry in record["checkpoints"]] == ["step-4.safetensors", "epoch-0.safetensors"]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8
        assert "Saved" in (folder / "train.log").read_text()
    lora, full = next(proofs for begin, proofs in PROOFS.items() if recipe.startswith(begin))
    assert outcome.out.count(full if "-full" in recipe else lora) == len(stages)
    yours = "YOUR_VIDEOS" if recipe.startswith("wan") else "YOUR_IMAGES"
    assert f"--recipe {recipe}" in outcome.out and f"--dataset_base_path {yours}" in outcome.out


def test_rehearsals_take_fresh_folders_and_named_ones_the_named(cli):
    common = ("train", "--recipe", "qwen-image-lora", "--rehearse", "--dataset_num_workers", 0, "--max_steps", 2)
    assert cli(*common).code == 0
    assert cli(*common).code == 0
    assert sorted(path.name for path in Path("rehearsals").iterdir()) == ["qwen-image-lora-1", "qwen-image-lora-2"]
    named = cli(*common, "--output_path", "mine")
    assert named.code == 0 and Path("mine/epoch-0.safetensors").is_file()


def test_the_users_own_images_are_rehearsed(cli, photographs):
    outcome = cli(
        "train",
        "--recipe",
        "qwen-image-lora",
        "--rehearse",
        "--dataset_base_path",
        photographs,
        "--lora_rank",
        7,
        "--dataset_num_workers",
        0,
    )
    assert outcome.code == 0, outcome.err
    assert f"--dataset_base_path {photographs}" in outcome.out and "--lora_rank 7" in outcome.out
    assert "4 samples from" in outcome.err


def test_local_model_files_are_rehearsed_by_their_headers(cli, tiny_models, photographs):
    """Files given by path are recognized, and replaced with tiny ones of the same component."""
    folder = tiny_models / MODEL_ID
    paths = [
        [str(path) for path in sorted((folder / "transformer").glob("*.safetensors"))],
        str(folder / "vae/diffusion_pytorch_model.safetensors"),
    ]
    outcome = cli(
        "train", "--rehearse", "--model_paths", json.dumps(paths), "--model_id_with_origin_paths", ENTRIES["text_encoder"],
        "--lora_base_model", "dit", "--dataset_base_path", photographs, "--max_steps", 2, "--verbose",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "local/Qwen-Image:transformer/model.safetensors" in outcome.err
    assert f"--model_paths '{json.dumps(paths)}'" in outcome.out, "the real command is what was typed"


def test_full_training_and_lora_in_one_rehearsal(cli):
    outcome = cli(
        "train",
        "--recipe",
        "qwen-image-lora",
        "--rehearse",
        "--trainable_models",
        "text_encoder,vae",
        "--max_steps",
        2,
        "--dataset_num_workers",
        0,
    )
    assert outcome.code == 0, outcome.err
    assert "all 57 tensors of text_encoder are in the checkpoint" in outcome.out
    assert "all 194 tensors of vae are in the checkpoint" in outcome.out
    assert "each of its 42 keys matches one of 21 modules of dit" in outcome.out


@pytest.mark.parametrize("lora_format", ["diffusers", "comfyui", "kohya"])
def test_rehearsals_prove_every_dialect(cli, lora_format):
    outcome = cli(
        "train",
        "--recipe",
        "qwen-image-lora",
        "--rehearse",
        "--lora_format",
        lora_format,
        "--max_steps",
        2,
        "--dataset_num_workers",
        0,
    )
    assert outcome.code == 0, outcome.err
    assert "keys matches one of 21 modules of dit" in outcome.out


@pytest.mark.parametrize(
    ("recipe", "size"),
    [("qwen-image-lora", ("--max_pixels", 65536)), ("wan2.1-t2v-1.3b-lora", ("--height", 64, "--width", 96, "--num_frames", 9))],
)  # fmt: skip
def test_a_size_that_is_given_is_rehearsed(cli, recipe, size):
    common = ("train", "--recipe", recipe, "--rehearse", "--dry_run")
    assert "at a small size" in cli(*common).err
    outcome = cli(*common, *size)
    assert outcome.code == 0 and "at a small size" not in outcome.err


def test_a_dry_run_writes_nothing(cli):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "LoRA of rank 32 on 21 modules" in outcome.out
    assert f"{len(DRAWN)} samples from" in outcome.out
    assert (
        "EXIF orientation is applied to 1 of 8 images" in outcome.out
        and "1 of 8 images has transparency" in outcome.out
    )
    assert not list(Path().iterdir())


@pytest.mark.parametrize("recipe", ["qwen-image-lora", pytest.param("wan2.2-t2v-a14b-lora", marks=pytest.mark.long)])
def test_the_real_command_rehearses(tmp_path, recipe):
    """`diffsynth train --recipe NAME --rehearse` as typed, with workers."""
    command = [sys.executable, "-m", "diffsynth_cli", "train", "--recipe", recipe, "--rehearse"]
    ended = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr
    assert ended.stdout.startswith(
        "The rehearsal of stage high proved:" if "a14b" in recipe else "The rehearsal proved:"
    )


def test_a_rehearsal_is_refused_to_several_processes(cli, monkeypatch):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse")
    assert outcome.code == 1
    assert "error: a rehearsal runs in one process, but this is one of 2" in outcome.err
    assert not list(Path().iterdir())


def test_a_rehearsal_starts_no_processes(cli):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--num_processes", "4")
    assert outcome.code == 1
    assert "error: a rehearsal runs in one process, but 4 are requested" in outcome.err
    assert "hint: remove `--num_processes` and `--accelerate_config`" in outcome.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("named", [False, True], ids=["a-folder-of-its-own", "a-folder-named"])
def test_a_stopped_rehearsal_tells_how_to_give_it_again(cli, monkeypatch, named):
    """SIGTERM to this process in the third step; if the folder was named, it is in use by then."""
    import signal

    from diffsynth_core.training.engines.replicated import ReplicatedEngine

    real, calls = ReplicatedEngine.gradient_norm, []

    def stopping(self):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(ReplicatedEngine, "gradient_norm", stopping)
    command = ("train", "--recipe", "qwen-image-lora", "--rehearse", "--dataset_num_workers", 0)
    command += ("--output_path", "out") if named else ()
    outcome = cli(*command)
    again = "delete `out`, or choose another `--output_path`"
    hint = again if named else "rerun the command"
    assert outcome.code == 143
    assert outcome.err.endswith(f"The rehearsal was interrupted; {hint}\n")
    if not named:
        return
    taken = "error: `output_path` `out` already holds a rehearsal (interrupted, 4 of 8 steps)\n"
    for other in (command, [word for word in command if word != "--rehearse"]):
        refused = cli(*other)
        assert (refused.code, f"{taken}  hint: {again}\n" in refused.err) == (2, True), refused.err
