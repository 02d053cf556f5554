"""From user input to files: paths, globs, folders, hub entries, shard lists, and what is missing."""

import pytest

from diffsynth_core.hub.model_files import (
    MissingFiles,
    expand_entry,
    expand_local,
    locate,
    locate_folder,
    split_entry,
)

ID = "Qwen/Qwen-Image"
FILES = (
    f"{ID}/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    f"{ID}/transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    f"{ID}/transformer/diffusion_pytorch_model.safetensors.index.json",
    f"{ID}/transformer/config.json",
    f"{ID}/vae/diffusion_pytorch_model.safetensors",
    f"{ID}/tokenizer/vocab.json",
    "single.safetensors",
    "with blank [v1].safetensors",
)


@pytest.fixture
def base(tmp_path):
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(paths) -> list[str]:
    return [path.name for path in paths]


SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (f"{ID}:transformer/diffusion_pytorch_model*.safetensors", SHARDS),
        (f" {ID} : transformer/diffusion_pytorch_model*.safetensors ", SHARDS),
        (f"{ID}:vae/diffusion_pytorch_model.safetensors", ["diffusion_pytorch_model.safetensors"]),
        (f"{ID}:transformer/*-0000[2]-of-*.safetensors", SHARDS[1:]),
        (f"{ID}:**/*.safetensors", [*SHARDS, "diffusion_pytorch_model.safetensors"]),
        (f"{ID}:vae/gone.safetensors", []),
        (f"{ID}:vae/GONE*", []),
        ("Nobody/Nothing:*.safetensors", []),
        (f"{ID}:", []),
    ],
)
def test_hub_entries_are_found_below_the_base(base, entry, expected):
    assert names(expand_entry(entry, base)) == expected


def test_hub_entries_do_not_look_into_the_working_folder(base, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(base)
    assert expand_entry(f"{ID}:vae/*.safetensors", tmp_path_factory.mktemp("empty")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("single.safetensors", ["single.safetensors"]),
        ("with blank [v1].safetensors", ["with blank [v1].safetensors"]),
        (f"{ID}/transformer", SHARDS),
        (f"{ID}/transformer/", SHARDS),
        (f"{ID}/*/diffusion*-of-*.safetensors", SHARDS),
        ("s?ngle.safetensors", ["single.safetensors"]),
        ("gone.safetensors", []),
        (f"{ID}/tokenizer", []),
        ("*.bin", []),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_local_paths_files_folders_and_globs(base, monkeypatch, text, expected, absolute):
    monkeypatch.chdir(base)
    written = f"{base}/{text}" if absolute else text
    assert names(expand_local(written)) == expected
    assert names(expand_entry(written, base / "elsewhere")) == expected


def test_the_home_folder_may_be_written_as_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base))
    assert expand_local("~/single.safetensors") == [base / "single.safetensors"]
    assert names(expand_local("~/s*.safetensors")) == ["single.safetensors"]


def test_a_local_file_with_a_colon_in_its_name_goes_first(base, monkeypatch):
    monkeypatch.chdir(base)
    (base / "a:b.safetensors").write_bytes(b"")
    assert names(expand_entry("a:b.safetensors", base / "elsewhere")) == ["a:b.safetensors"]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("a/b:c/*.x", ("a/b", "c/*.x")),
        (" a/b : c ", ("a/b", "c")),
        ("a/b:c:d", ("a/b", "c:d")),
        ("a/b", None),
        ("a/b:", None),
        ("a/b: ", None),
    ],
)
def test_entries_are_split_at_the_first_colon(entry, parts):
    assert split_entry(entry) == parts


def test_locate_keeps_the_order_and_says_what_was_written(base, monkeypatch):
    monkeypatch.chdir(base)
    shards = [f"{ID}/transformer/{name}" for name in SHARDS]
    found, problems = locate([shards, ["single.safetensors"]], [f"{ID}:vae/*.safetensors"], base)
    assert problems == []
    assert [item.origin for item in found] == [", ".join(shards), "single.safetensors", f"{ID}:vae/*.safetensors"]
    assert [names(item.paths) for item in found] == [
        SHARDS,
        ["single.safetensors"],
        ["diffusion_pytorch_model.safetensors"],
    ]


def test_every_missing_file_is_told(base, monkeypatch):
    monkeypatch.chdir(base)
    groups = [["gone-1.safetensors", "single.safetensors", "gone-2.safetensors"], ["single.safetensors"]]
    found, problems = locate(groups, [f"{ID}:text_encoder/*", "gone-3.safetensors"], base)
    assert [item.origin for item in found] == ["single.safetensors"]
    assert [problem.message for problem in problems] == [
        "`model_paths` names `gone-1.safetensors`, which does not exist",
        "`model_paths` names `gone-2.safetensors`, which does not exist",
        f"`model_id_with_origin_paths`: nothing matches `{ID}:text_encoder/*` below `{base}`",
        "`model_id_with_origin_paths`: nothing matches `gone-3.safetensors`",
    ]
    assert f"`diffsynth download '{ID}:text_encoder/*'`" in (problems[2].hint or "")
    assert [isinstance(problem, MissingFiles) for problem in problems] == [False, False, True, False]


@pytest.mark.parametrize(
    "entry", [f"{ID}:/transformer/*", f"{ID}:**.safetensors", "models/**.safetensors", "~nobody-there/x*.safetensors"]
)
@pytest.mark.parametrize("as_path", [False, True])
def test_an_entry_that_makes_no_sense_is_a_problem_and_no_crash(base, entry, as_path):
    found, problems = locate([[entry]] if as_path else [], [] if as_path else [entry], base)
    assert found == []
    assert len(problems) == 1 and f"`{entry}`" in problems[0].message


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        ((1, 2, 3), None),
        ((1, 3), "1 shard, the first is `model-00002-of-00003.safetensors`"),
        ((3,), "2 shards, the first is `model-00001-of-00003.safetensors`"),
    ],
)
def test_shards_that_the_names_promise_must_be_there(tmp_path, kept, missing):
    for number in kept:
        (tmp_path / f"model-{number:05d}-of-00003.safetensors").write_bytes(b"")
    found, problems = locate([], [f"{tmp_path}/model*.safetensors"], tmp_path)
    assert len(found) == (0 if missing else 1)
    assert [problem.message.partition(" is missing ")[2] for problem in problems] == ([missing] if missing else [])


def test_shards_of_two_models_in_one_folder_are_told_apart(tmp_path):
    for name in ("a-00001-of-00001", "b-00001-of-00002", "b-00002-of-00002", "plain"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert locate([[str(tmp_path)]], [], tmp_path)[1] == []
    (tmp_path / "b-00002-of-00002.safetensors").unlink()
    (problem,) = locate([[str(tmp_path)]], [], tmp_path)[1]
    assert "`b-00002-of-00002.safetensors`" in problem.message


@pytest.mark.parametrize("text", [f"{ID}:tokenizer", f"{ID}:tokenizer/", f" {ID} : tokenizer "])
def test_a_folder_may_be_named_as_a_hub_entry(base, text):
    assert locate_folder(text, base) == base / ID / "tokenizer"


def test_a_folder_may_be_named_as_a_path(base, monkeypatch):
    monkeypatch.chdir(base)
    assert locate_folder(f"{ID}/tokenizer", base / "elsewhere") is not None
    assert locate_folder(str(base / ID / "tokenizer"), base / "elsewhere") == base / ID / "tokenizer"
    assert locate_folder("single.safetensors", base) is None
    assert locate_folder(f"{ID}:gone", base) is None


def test_a_copy_is_read_only_for_the_entry_of_a_repository(tmp_path):
    """A local path denotes that file only."""
    mirrors = {"VAE.pth": "Copies/All:VAE.safetensors"}
    place = tmp_path / "Copies/All/VAE.safetensors"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    ([found], problems) = locate([], ["Owner/Model:VAE.pth"], tmp_path, mirrors)
    assert (found.paths, found.mirror, problems) == ((place,), "Copies/All:VAE.safetensors", [])
    assert found.source == "Owner/Model:VAE.pth, read from its mirror Copies/All:VAE.safetensors"
    assert found.home == tmp_path / "Owner/Model"
    for entry in ("mine/VAE.pth", "VAE.pth"):
        found, [problem] = locate([], [entry], tmp_path, mirrors)
        assert found == [] and "Copies" not in problem.message
    own = tmp_path / "Owner/Model/VAE.pth"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    ([found], _) = locate([], ["Owner/Model:VAE.pth"], tmp_path, mirrors)
    assert (found.paths, found.mirror) == ((own,), None)
