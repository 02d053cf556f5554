"""Requested hub files: globs, layouts, shards, alternatives, and which of them are on disk."""

import pytest

from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.resolve import resolve
from diffsynth_core.hub.client import Repository
from diffsynth_core.hub.file_requests import FileRequest, RepoFiles, absent, paths_below
from diffsynth_core.models.wan.spec import CONVERTED, WAN
from diffsynth_core.planning.model.required_files import (
    download_hint,
    files_of_entry,
    files_of_recipe,
    required_files,
)

MODEL = Repository("model", "a/b")


def place(*patterns: str, **settings) -> RepoFiles:
    return RepoFiles(MODEL, patterns, **settings)


@pytest.mark.parametrize(
    ("pattern", "path", "meant"),
    [
        ("vae/*.safetensors", "vae/x.safetensors", True),
        ("vae/*.safetensors", "vae/deep/x.safetensors", False),
        ("vae/*.safetensors", "other/vae/x.safetensors", False),
        ("model.pth", "model.pth", True),
        ("model.pth", "deep/model.pth", False),
        ("*", "model.pth", True),
        ("*", "deep/model.pth", False),
        ("**/*.pth", "deep/er/model.pth", True),
        ("**/*.pth", "model.pth", True),
        ("**", "deep/er/model.pth", True),
        ("VAE/*", "vae/x", False),
    ],
)
def test_a_glob_means_on_the_hub_what_it_means_on_disk(pattern, path, meant, tmp_path):
    assert place(pattern).choose([path]) == [path] * meant
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    if pattern != "**":  # which means folders alone on disk
        assert [found for found in tmp_path.glob(pattern) if found.is_file()] == [file] * meant


def test_globs_of_datasets_go_over_folders():
    assert place("set/*", anywhere=True).choose(["set/a/b.png", "other/set/c.png"]) == ["set/a/b.png"]


def test_a_place_is_whole_when_every_pattern_finds_something_and_no_shard_is_missed():
    shards = [f"x/model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert place("x/*").is_complete(shards)
    assert not place("x/*").is_complete(shards[:2])
    assert not place("x/*", "y/*").is_complete(shards)
    assert not place("y/*").is_complete([])


def test_a_layout_must_be_whole():
    tokenizer = place("t/*", layouts=(("t/tokenizer.json",), ("t/vocab.json", "t/merges.txt")))
    assert tokenizer.is_complete(["t/tokenizer.json"])
    assert tokenizer.is_complete(["t/vocab.json", "t/merges.txt"])
    assert not tokenizer.is_complete(["t/vocab.json", "t/other.json"])


def test_what_is_absent(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/here.pth").touch()
    (tmp_path / "a/b/.gone.pth.123.part").touch()
    here, gone = place("here.pth"), place("*gone.pth*")
    assert paths_below(tmp_path / "a/b") == ["here.pth"]
    assert absent([FileRequest((here,))], tmp_path) == []
    assert absent([FileRequest((gone, here))], tmp_path) == []
    assert absent([FileRequest((gone,))], tmp_path) == [FileRequest((gone,))]
    assert absent([FileRequest((gone,), optional=True)], tmp_path) == []


def shown(wanted: list[FileRequest]) -> list[str]:
    return [" or ".join(map(str, item.sources)) + ("?" if item.optional else "") for item in wanted]


def test_weights_come_with_their_config_and_tokenizer_and_the_processor_where_images_are_shown():
    assert shown(files_of_recipe("qwen-image-edit-lora")) == [
        "Qwen/Qwen-Image-Edit:transformer/diffusion_pytorch_model*.safetensors",
        "Qwen/Qwen-Image-Edit:transformer/config.json?",
        "Qwen/Qwen-Image:text_encoder/model*.safetensors",
        "Qwen/Qwen-Image:text_encoder/config.json?",
        "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
        "Qwen/Qwen-Image:vae/config.json?",
        "Qwen/Qwen-Image:tokenizer/*",
        "Qwen/Qwen-Image:processor/* or Qwen/Qwen-Image-Edit:processor/*",
    ]


def test_all_stages_of_a_recipe_and_the_copies_of_pickled_files():
    model = "Wan-AI/Wan2.2-T2V-A14B"
    assert shown(files_of_recipe("wan2.2-t2v-a14b-full")) == [
        f"{model}:high_noise_model/diffusion_pytorch_model*.safetensors",
        f"{model}:high_noise_model/config.json?",
        f"{model}:models_t5_umt5-xxl-enc-bf16.pth or {CONVERTED}:models_t5_umt5-xxl-enc-bf16.safetensors",
        f"{model}:config.json?",
        f"{model}:Wan2.1_VAE.pth or {CONVERTED}:Wan2.1_VAE.safetensors",
        f"{model}:google/umt5-xxl/* or Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/*",
        f"{model}:low_noise_model/diffusion_pytorch_model*.safetensors",
        f"{model}:low_noise_model/config.json?",
    ]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_wants_its_entries_and_a_tokenizer(recipe):
    wanted = files_of_recipe(recipe)
    if recipe.startswith("shapes-"):
        assert wanted == [], "its model is shipped"
        return
    assert len(wanted) == len(set(wanted))
    assert any(item.sources[-1].layouts for item in wanted)
    assert not any(".." in pattern for item in wanted for place in item.sources for pattern in place.patterns)


@pytest.mark.parametrize(
    ("flags", "gone"),
    [
        ({"task": "sft:data_process"}, ["transformer/"]),
        ({"task": "sft:train"}, ["text_encoder/", "vae/", "tokenizer/"]),
        ({"tokenizer_path": "elsewhere/mine:tok/"}, ["Qwen/Qwen-Image:tokenizer/"]),
    ],
)
def test_what_a_run_does_not_need_is_not_wanted(flags, gone):
    resolved = resolve({"recipe": "qwen-image-lora", **flags})
    found = shown(required_files(resolved.parameters, resolved.family))
    assert not [item for item in found if any(part in item for part in gone)]
    assert ("elsewhere/mine:tok/*" in found) == ("tokenizer_path" in flags)


def test_paths_of_ones_own_are_not_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/dit.safetensors").touch()
    (tmp_path / "tokenizer").mkdir()
    flags = {"model_paths": '["mine/dit.safetensors"]', "model_id_with_origin_paths": "mine/dit.safetensors"}
    assert required_files(resolve(flags).parameters, "qwen-image") == []


def test_a_folder_and_a_glob_in_the_folder():
    assert shown(files_of_entry("a/b:tokenizer/")) == ["a/b:tokenizer/*", "a/b:tokenizer/config.json?"]
    assert shown(files_of_entry("a/b:*/x.safetensors")) == ["a/b:*/x.safetensors"]
    assert shown(files_of_entry("a/b:Wan2.1_VAE.pth", WAN))[0].endswith(f"or {CONVERTED}:Wan2.1_VAE.safetensors")


def test_the_command_that_brings_an_entry():
    entry = "Wan-AI/Wan2.2-T2V-A14B:low_noise_model/diffusion_pytorch_model*.safetensors"
    assert download_hint(entry, "wan2.2-t2v-a14b-lora") == "diffsynth download wan2.2-t2v-a14b-lora"
    assert download_hint(entry, "qwen-image-lora") == f"diffsynth download '{entry}'"
    assert download_hint("a/b:c.pth", None) == "diffsynth download a/b:c.pth"
