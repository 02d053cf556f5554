"""`--model_paths` with a recipe: replaces its entries, and is rejected before anything is downloaded."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import MODEL_ID

START = ("train", "--device", "cpu", "--dataset_num_workers", 0, "--max_steps", 1)
CHANGING = (r"[\d.]+ GB free", r"\d+(\.\d+)?/s, \d+ s left")


@pytest.fixture
def mine(tiny_models: Path, tmp_path: Path, cli, monkeypatch) -> Path:
    """A copy of the tiny Qwen-Image in a user's folder, and an empty folder of downloaded models."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    return Path(shutil.copytree(tiny_models / MODEL_ID, tmp_path / "mine"))


def paths(mine: Path, *names: str) -> tuple[str, str]:
    return "--model_paths", json.dumps([str(mine / name) for name in names])


def test_a_recipe_on_files_of_ones_own(cli, mine, photographs):
    """No repository of the recipe is required: the plan works without a hub."""
    given = (*paths(mine, "transformer", "text_encoder", "vae"), "--dataset_base_path", photographs)
    planned = cli(*START, "--recipe", "qwen-image-lora", *given, "--dry_run", "--verbose")
    assert planned.code == 0, planned.err
    assert f"  dit             {mine}/transformer (2 files, " in planned.out
    assert "missing" not in planned.out and "Qwen/Qwen-Image:" not in planned.out


@pytest.mark.parametrize("recipe", [("--recipe", "qwen-image-lora"), ("--lora_base_model", "dit")])
@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_path_that_is_wrong_is_the_only_problem(cli, mine, photographs, recipe, dry):
    """The entries that it was meant to replace are not reported, and nothing is estimated without it."""
    given = paths(mine, "transfomer", "text_encoder", "vae")
    outcome = cli(*START, *recipe, *given, "--dataset_base_path", photographs, *dry)
    assert (outcome.code, outcome.out) == (1, "")
    problems = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert problems == [f"error: `model_paths` names `{mine}/transfomer`, which does not exist"]


def test_a_folder_without_weights(cli, mine, photographs, says):
    outcome = cli(*START, "--recipe", "qwen-image-lora", *paths(mine, "tokenizer"), "--dataset_base_path", photographs)
    assert outcome.code == 1
    assert f"the folder `{mine}/tokenizer`, which contains no weights" in outcome.err
    says(outcome, *CHANGING)


def test_a_gguf_file_in_place_of_the_transformer(cli, mine, photographs, says):
    (mine / "model-Q4.gguf").write_bytes(b"GGUF" + bytes(60))
    given = paths(mine, "model-Q4.gguf", "text_encoder", "vae")
    outcome = cli(*START, "--recipe", "qwen-image-lora", *given, "--dataset_base_path", photographs)
    assert outcome.code == 1
    assert f"`{mine}/model-Q4.gguf` is a GGUF file" in outcome.err
    says(outcome, *CHANGING)


def test_a_shard_left_out_of_a_flat_list(cli, mine, photographs, says):
    shard = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    given = paths(mine, shard, "text_encoder", "vae")
    outcome = cli(*START, "--recipe", "qwen-image-lora", *given, "--dataset_base_path", photographs)
    assert outcome.code == 1
    assert "`diffusion_pytorch_model-00002-of-00002.safetensors`" in outcome.err
    says(outcome, *CHANGING)
