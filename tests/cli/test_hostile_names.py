"""Names and texts with control characters, invalid UTF-8 or impossible file names: one escaped message each."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ESCAPE = "\x1b[31m[red]x\x9b\u202e"
SPELLED = "\\u001b[31m[red]x\\u009b\\u202e"
LONG = "n" * 300


def printed(outcome) -> str:
    """Return the output, which contains no control characters and no internal error."""
    text = outcome.out + outcome.err
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "internal error" not in text
    text.encode()
    return text


def test_a_key_and_a_value_of_yaml(cli):
    Path("mine.yaml").write_text(json.dumps({"parameters": {ESCAPE: 1, "task": ESCAPE}}))
    outcome = cli("train", "--recipe", "qwen-image-lora", "--config", "mine.yaml", "--dry_run")
    assert outcome.code == 2
    assert printed(outcome).count(SPELLED) >= 2


def test_names_of_tensors_and_of_files(cli):
    lora, base = Path(f"{ESCAPE}.safetensors"), Path("base.safetensors")
    save_file({f"{ESCAPE}.lora_A.weight": np.zeros((4, 8), np.float32)}, lora)
    save_file({f"{ESCAPE}.weight": np.zeros((4, 8), np.float32), "b": np.zeros(3, np.float32)}, base)
    for arguments in (
        ("convert-lora", lora, "--to", "comfyui", "-o", "out.safetensors"),
        ("merge-lora", "--base", base, "--lora", lora, "--output_path", "out"),
        ("train", "--recipe", "qwen-image-lora", "--lora_checkpoint", lora, "--dry_run"),
    ):
        outcome = cli(*arguments)
        assert outcome.code in (1, 2), arguments
        assert "\\u001b" in printed(outcome), arguments
    outcome = cli("split-ckpt", base, "--max_shard_size", "1GB", "--dry_run", "--format", "json")
    assert "\x1b" not in outcome.out
    if outcome.code == 0:
        json.loads(outcome.out)


def test_captions_and_columns(cli, dataset):
    (dataset / "metadata.csv").write_text(f"image,prompt,{ESCAPE}\nastronaut.png,{ESCAPE},1\ngone{ESCAPE}.png,a,1\n")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert outcome.code == 1 and f"gone{SPELLED}.png" in printed(outcome)
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    assert json.loads(outcome.out)["summary"]["errors"]
    printed(outcome)


def test_a_caption_of_megabytes(cli, dataset):
    (dataset / "metadata.csv").unlink()
    (dataset / "metadata.json").write_text(json.dumps([{"image": "coffee.png", "prompt": "x " * 10_000_000}]))
    message = "column `prompt` has 20000000 characters, expected at most 100000"
    outcome = cli("dataset", "validate", dataset, "--recipe", "qwen-image-lora", "--format", "json")
    (finding,) = [one for one in json.loads(outcome.out)["findings"] if one["level"] == "error"]
    assert (outcome.code, finding["message"]) == (1, f"row 1: {message}")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run")
    assert outcome.code == 1 and message in printed(outcome)


def test_a_folder_whose_name_is_not_utf8(cli, dataset, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/photos-\xff")
    shutil.move(dataset, folder)
    train = ("train", "--recipe", "qwen-image-lora", "--device", "cpu", "--dataset_num_workers", 0)
    outcome = cli(*train, "--dataset_base_path", folder, "--dry_run")
    assert outcome.code == 0 and "photos-\\udcff" in printed(outcome)
    assert cli("dataset", "validate", folder).code == 0
    outcome = cli(*train, "--dataset_base_path", folder, "--output_path", f"{folder}/out", "--max_steps", 1)
    printed(outcome)
    assert outcome.code == 0
    record = json.loads(Path(folder, "out", "run.json").read_text())
    assert record["parameters"]["dataset_base_path"] == folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--recipe", LONG),
        ("train", "--recipe", f"{LONG}.yaml"),
        ("train", "--recipe", "qwen-image-lora", "--config", f"{LONG}.yaml"),
        ("train", "--recipe", "qwen-image-lora", "--dataset_base_path", LONG, "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--dataset_metadata_path", f"{LONG}.csv", "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--output_path", LONG, "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--lora_checkpoint", f"{LONG}.safetensors", "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--tokenizer_path", LONG, "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--model_paths", f'["{LONG}.safetensors"]', "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--accelerate_config", f"{LONG}.yaml", "--dry_run"),
        ("train", f"--{LONG}", "1"),
        ("recipe", "show", LONG),
        ("dataset", "validate", LONG),
        ("dataset", "validate", ".", "--recipe", LONG),
        ("split-ckpt", f"{LONG}.safetensors"),
        ("merge-lora", "--base", LONG, "--lora", LONG, "--output_path", LONG),
        ("convert-lora", LONG, "--to", "comfyui", "-o", LONG),
        ("download", "--model_id", f"a/{LONG}"),
        ("download", "--recipe", LONG),
    ],
    ids=lambda arguments: " ".join(word for word in map(str, arguments) if LONG not in word)[:60],
)
def test_names_that_are_too_long(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code in (1, 2)
    assert "error: " in printed(outcome)


@pytest.mark.parametrize("setting", ["dataset_base_path", "output_path", "lora_checkpoint", "tokenizer_path", "config"])
def test_a_name_with_a_nul(cli, setting):
    Path("mine.yaml").write_text(json.dumps({"parameters": {setting: "a\0b"}}))
    outcome = cli("train", "--recipe", "qwen-image-lora", "--config", "mine.yaml", "--dry_run")
    assert outcome.code in (1, 2)
    assert "error: " in printed(outcome)


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("learning_rate", "1e38", "1e+30"),
        ("weight_decay", "1e308", "1e+30"),
        ("dataset_repeat", 10**30, "9007199254740992"),
        ("save_steps", 10**18, "9007199254740992"),
    ],
)
def test_numbers_that_nothing_computes_with(cli, flag, value, limit):
    outcome = cli("train", "--recipe", "qwen-image-lora", f"--{flag}", value, "--dry_run")
    assert outcome.code == 2
    assert f"`{flag}`" in printed(outcome) and f"at most {limit}" in outcome.err


def test_an_image_that_is_deleted_before_the_fingerprint(cli, dataset, monkeypatch):
    from diffsynth_core.planning import plan

    take = plan.dataset_fingerprint

    def deleted_before(parameters, samples):
        (dataset / "coffee.png").unlink()
        return take(parameters, samples)

    monkeypatch.setattr(plan, "dataset_fingerprint", deleted_before)
    outcome = cli(
        "train", "--recipe", "qwen-image-lora", "--device", "cpu", "--dataset_base_path", dataset, "--max_steps", 1
    )
    assert outcome.code == 1
    assert f"error: cannot access `{dataset / 'coffee.png'}`: No such file or directory" in printed(outcome)


def test_a_folder_in_the_place_of_a_file_and_a_loop_of_links(cli):
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("loop").symlink_to("loop")
    Path("folder.yaml").mkdir()
    for arguments in (
        ("train", "--recipe", "qwen-image-lora", "--config", "loop.yaml"),
        ("train", "--recipe", "qwen-image-lora", "--config", "folder.yaml"),
        ("train", "--recipe", "qwen-image-lora", "--dataset_base_path", "loop", "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--output_path", "loop/out", "--dry_run"),
        ("train", "--recipe", "qwen-image-lora", "--model_paths", '["loop"]', "--dry_run"),
        ("dataset", "validate", "loop"),
        ("split-ckpt", "loop"),
        ("convert-lora", "loop", "--to", "comfyui", "-o", "out.safetensors"),
    ):
        outcome = cli(*arguments)
        assert outcome.code in (1, 2), arguments
        assert "error: " in printed(outcome), arguments
