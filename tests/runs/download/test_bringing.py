"""`diffsynth download` through the real SDKs, against a hub on the loopback interface: what it lists and downloads."""

import json
import shutil
from pathlib import Path

import pytest

from tests.hub_server import sha256
from tests.runs.download.conftest import DATASET, FILES, MODEL, RECIPE, REFUSED, SHARDS, TOTAL, files_below, start


def test_a_fresh_download_and_a_second_one(environment, hub, source, tmp_path, folder):
    """In a separate process, in which the SDKs read the environment themselves."""
    command = ("download", RECIPE, "--source", source)
    out, err = start(environment, tmp_path, *command).communicate(timeout=60)
    assert out == f"Downloaded 8 files, {TOTAL}, below `{tmp_path}/models`\n", err
    assert f"  missing     400.0 kB  {SHARDS[0]}" in err.splitlines()
    assert f"8 files, {TOTAL}: 8 missing" in err.splitlines()
    assert f"8 files in total: {TOTAL} of {TOTAL}" in err
    assert files_below(folder) == FILES
    assert any("secret" in token for token in hub.tokens) and "secret" not in out + err
    transfers = len(hub.transfers)
    again, err = start(environment, tmp_path, *command).communicate(timeout=60)
    assert again == f"All 8 files are already present below `{tmp_path}/models`\n"
    assert f"8 files, {TOTAL}: 8 here" in err
    assert len(hub.transfers) == transfers == 8


def test_the_list_alone(download, hub, source, models, folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / SHARDS[0]).write_bytes(FILES[SHARDS[0]])
    (folder / SHARDS[1]).write_bytes(FILES[SHARDS[1]][:1000])
    outcome = download(RECIPE, "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    states = {listed["path"]: (listed["state"], listed["bytes_here"]) for listed in plan["files"]}
    assert states.keys() == FILES.keys()
    assert states[SHARDS[0]] == ("here", 400_000)
    assert states[SHARDS[1]] == ("incomplete", 1000)
    assert states["tokenizer/vocab.json"] == ("missing", 0)
    assert plan["missing_bytes"] == sum(map(len, FILES.values())) - 401_000
    assert (plan["hub"], plan["base"]) == (REFUSED[source][0], str(models))
    assert hub.transfers == [] and not (models / ".download.lock").exists()
    text = download(RECIPE, "--dry_run").out.splitlines()
    assert text[0] == f"{MODEL} on {REFUSED[source][0]}, to `{folder}`"
    assert f"  incomplete  300.0 kB  {SHARDS[1]} (1.0 kB here)" in text


def test_a_long_list_is_cut(download, hub):
    hub.repositories[f"datasets/{DATASET}"] = {f"{number:03}.png": b"x" for number in range(450)}
    lines = download("--dataset", DATASET, "--dry_run").out.splitlines()
    assert lines[60:63] == [
        "  missing          1 B  059.png",
        "  … and 390 more; `--format json` lists all",
        "450 files, 450 B: 450 missing",
    ]


def test_a_dataset_and_a_part_of_it(download, tmp_path):
    assert download("--dataset", DATASET, "--include", "set/*").code == 0
    assert files_below(Path("data/images")).keys() == {"set/a.png", "set/b.png", "set/c.png", "set/deep/d.png"}
    assert download("--dataset", DATASET, "--local-dir", tmp_path / "mine").code == 0
    assert "other/e.png" in files_below(tmp_path / "mine")


def test_a_folder_named_goes_over_the_environment(download, tmp_path):
    assert download(f"{MODEL}:vae/diffusion*", "--local_model_path", tmp_path / "mine").code == 0
    found = files_below(tmp_path / "mine" / MODEL)
    assert found == {path: FILES[path] for path in ["vae/diffusion_pytorch_model.safetensors"]}


def test_hashes_are_remembered_for_runs(download, folder, tmp_path):
    from diffsynth_core.hub.identity import HashCache

    download(RECIPE)
    identities = HashCache(tmp_path / "cache/diffsynth/identities.jsonl")
    assert identities.known(folder / SHARDS[0]) == sha256(FILES[SHARDS[0]])


SETTINGS = ("--recipe", RECIPE, "--device", "cpu", "--dataset_num_workers", 0, "--max_steps", 1, "--lora_rank", 2)
"""A short LoRA run of the recipe."""


def test_train_brings_what_it_lacks(here, hub, tiny_models, photographs, folder, monkeypatch):
    """It lists the files with their sizes, then trains; existing files are not downloaded again."""
    content = files_below(tiny_models / MODEL)
    hub.repositories[f"models/{MODEL}"] = content
    kept = "vae/diffusion_pytorch_model.safetensors"
    (folder / "vae").mkdir(parents=True)
    (folder / kept).write_bytes(content[kept])
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    outcome = here("train", *SETTINGS, "--dataset_base_path", photographs)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Checkpoint  ")
    listed, trained = outcome.err.index(f"{MODEL} on Hugging Face"), outcome.err.index("Qwen-Image on cpu")
    assert listed < trained and f"  {kept}" in outcome.err
    assert hub.starts(kept) == [] and hub.starts("vae/config.json") == [0]
    assert files_below(folder) == {path: data for path, data in content.items() if not path.endswith(".index.json")}


def test_train_brings_nothing_for_a_command_that_is_refused(here, hub, tmp_path, models):
    outcome = here("train", *SETTINGS, "--dataset_base_path", tmp_path / "nowhere")
    assert (outcome.code, outcome.out) == (1, "")
    assert "nowhere` (`dataset_base_path`) does not exist" in outcome.err
    assert "`diffsynth download qwen-image-lora`" in outcome.err
    assert hub.requests.total() == 0 and not models.exists()


def test_a_dry_run_of_train_brings_nothing(here, hub, photographs, models):
    outcome = here("train", *SETTINGS, "--dataset_base_path", photographs, "--dry_run")
    assert outcome.code == 0 and "error" not in outcome.err
    assert "57.7 GB to download; `diffsynth download qwen-image-lora` downloads them" in outcome.out
    assert hub.requests.total() == 0 and not models.exists()


@pytest.mark.parametrize(("source", "other"), [("modelscope", "huggingface"), ("huggingface", "modelscope")])
def test_train_offers_another_hub_by_the_variable_it_reads(here, hub, photographs, monkeypatch, source, other):
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", source)
    hub.lists = b"<html>log in</html>"
    outcome = here("train", *SETTINGS, "--dataset_base_path", photographs)
    assert outcome.code == 1
    assert outcome.err.endswith(f", or use another hub with `DIFFSYNTH_DOWNLOAD_SOURCE={other}`\n")


def test_train_brings_nothing_that_files_of_ones_own_replace(here, hub, tiny_models, photographs, tmp_path):
    """Recognized by content, before a hub is accessed; a wrong path does not start a download."""
    content = files_below(tiny_models / MODEL)
    hub.repositories[f"models/{MODEL}"] = content
    mine = tmp_path / "mine"
    shutil.copytree(tiny_models / MODEL, mine)
    given = ("--model_paths", json.dumps([str(mine / name) for name in ("transformer", "text_encoder", "vae")]))
    outcome = here("train", *SETTINGS, *given, "--dataset_base_path", photographs)
    assert outcome.code == 0, outcome.err
    (mine / "transformer").rename(mine / "moved")
    outcome = here("train", *SETTINGS, *given, "--dataset_base_path", photographs, "--output_path", tmp_path / "other")
    assert outcome.code == 1
    assert hub.requests.total() == 0
