"""The encoding cache: atomic entries, damage reported clearly, and a name that depends on every part."""

import re
import resource
from pathlib import Path

import pytest
import torch

from diffsynth_core.data.cache import EncodingCache, encoding_key
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.hub.file_cache import FileCache

PARTS = {
    "encoder": "latents",
    "version": 1,
    "files": ["ab", "cd"],
    "precision": "bf16",
    "inputs": {"image": ["ef", 512, 768]},
}
KEY = encoding_key(**PARTS)
ENCODED = {
    "latents": torch.randn(4, 2, 3),
    "mask": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def cache(tmp_path):
    return EncodingCache(tmp_path / "encodings")


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(cache, tmp_path):
    assert not cache.has(KEY)
    cache.write(KEY, ENCODED)
    assert cache.has(KEY)
    read = cache.read(KEY)
    assert read.keys() == ENCODED.keys()
    for name, tensor in ENCODED.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert everything_below(tmp_path) == [f"encodings/{KEY[:2]}/{KEY}.safetensors"]


def test_views_and_tensors_with_gradients_are_kept_by_value(cache):
    whole = torch.arange(12.0, requires_grad=True)
    cache.write(KEY, {"part": whole.view(3, 4)[:, 1:3]})
    assert cache.read(KEY)["part"].tolist() == [[1, 2], [5, 6], [9, 10]]


@pytest.mark.parametrize(
    "broken",
    [{"complex": torch.zeros(2, dtype=torch.complex128)}, {"sparse": torch.eye(3).to_sparse()}, {"none": None}],
)
def test_what_cannot_be_written_leaves_nothing(cache, tmp_path, broken):
    with pytest.raises((RuntimeError, ValueError, AttributeError, KeyError)):
        cache.write(KEY, broken)
    assert not cache.has(KEY)
    assert everything_below(tmp_path) == []


def test_a_full_disk_leaves_nothing_and_is_one_clear_error(cache, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Exception) as caught:
            cache.write(KEY, {"latents": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything_below(tmp_path) == []
    assert isinstance(caught.value, DiffSynthError), repr(caught.value)
    assert str(cache.path(KEY)) in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: b"",
        lambda whole: whole[:5],
        lambda whole: b"x" * 300,
        lambda whole: whole[:-3] + bytes([whole[-3] ^ 16]) + whole[-2:],
        lambda whole: whole.replace(b"latents", b"lttents"),
        lambda whole: whole.replace(b'"BF16"', b'"F16" '),
        lambda whole: whole.replace(b"sha256", b"sha255"),
        lambda whole: whole[:-32] + bytes(32),
    ],
)
def test_a_damaged_entry_is_told_and_removed(cache, damage):
    cache.write(KEY, ENCODED)
    path = cache.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert not cache.has(KEY) and cache.is_damaged(KEY)
    with pytest.raises(DiffSynthError, match=re.escape(str(path))) as caught:
        cache.read(KEY)
    assert caught.value.problems[0].hint == "continue with `--resume auto` to encode it again"
    assert not path.exists() and not cache.is_damaged(KEY)


def test_an_entry_from_before_entries_had_hashes_is_whole(cache):
    from safetensors.torch import save_file

    cache.path(KEY).parent.mkdir(parents=True)
    save_file(ENCODED, cache.path(KEY))
    assert cache.has(KEY)
    assert torch.equal(cache.read(KEY)["latents"], ENCODED["latents"])


def test_a_whole_entry_is_read_back_once(tmp_path):
    """A write or verification is cached by size and times; a change of the file is noticed."""
    memory = FileCache(tmp_path / "memory.jsonl")
    cache = EncodingCache(tmp_path / "encodings", memory=memory)
    cache.write(KEY, ENCODED)
    assert cache.is_known(KEY)
    again = EncodingCache(tmp_path / "encodings", memory=FileCache(tmp_path / "memory.jsonl"))
    assert again.is_known(KEY) and again.has(KEY)
    content = bytearray(cache.path(KEY).read_bytes())
    content[-1] ^= 1
    cache.path(KEY).write_bytes(content)
    assert not again.is_known(KEY) and not again.has(KEY)


def test_a_damaged_entry_is_brought_anew_from_the_cache_behind(tmp_path):
    behind = EncodingCache(tmp_path / "behind")
    cache = EncodingCache(tmp_path / "own", behind)
    behind.write(KEY, ENCODED)
    cache.write(KEY, ENCODED)
    cache.path(KEY).write_bytes(b"damaged")
    assert cache.has(KEY)
    cache.fetch(KEY)
    assert torch.equal(cache.read(KEY)["latents"], ENCODED["latents"])


def test_an_entry_that_is_gone_is_told(cache):
    with pytest.raises(DiffSynthError, match=KEY):
        cache.read(KEY)


def test_a_folder_in_place_of_an_entry_is_no_entry(cache):
    cache.path(KEY).mkdir(parents=True)
    assert not cache.has(KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "text"},
        {"version": 2},
        {"version": "1"},
        {"files": ["ab"]},
        {"files": ["cd", "ab"]},
        {"files": ["abcd"]},
        {"precision": "no"},
        {"inputs": {"image": ["ef", 768, 512]}},
        {"inputs": {"image": ["e0", 512, 768]}},
        {"inputs": {"edit_image": ["ef", 512, 768]}},
        {"inputs": {"prompt": "ef"}},
        {"more": None},
    ],
)
def test_every_part_changes_the_key(change):
    assert encoding_key(**{**PARTS, **change}) != KEY


def test_captions_change_the_key_by_every_character():
    captions = ["", " ", "a", "A", "a ", "ä", "a\u0308", "a\n"]
    assert len({encoding_key(inputs={"prompt": caption}) for caption in captions}) == len(captions)


def test_the_key_does_not_depend_on_the_order_of_names_and_fits_a_file_name():
    assert encoding_key(**dict(reversed(PARTS.items()))) == KEY
    assert re.fullmatch("[0-9a-f]{64}", KEY)


def test_entries_of_the_cache_behind_count_and_are_fetched(tmp_path):
    behind = EncodingCache(tmp_path / "behind")
    cache = EncodingCache(tmp_path / "own", behind)
    behind.write("ab12", {"latents": torch.ones(2)})
    assert cache.has("ab12") and not cache.path("ab12").exists()
    cache.fetch("ab12")
    assert cache.path("ab12").samefile(behind.path("ab12"))
    assert torch.equal(cache.read("ab12")["latents"], torch.ones(2))
    cache.fetch("ab12")
    assert len(list(cache.path("ab12").parent.iterdir())) == 1


def test_an_entry_of_its_own_is_not_fetched(tmp_path):
    behind = EncodingCache(tmp_path / "behind")
    cache = EncodingCache(tmp_path / "own", behind)
    behind.write("ab12", {"latents": torch.ones(2)})
    cache.write("ab12", {"latents": torch.zeros(2)})
    cache.fetch("ab12")
    assert torch.equal(cache.read("ab12")["latents"], torch.zeros(2))


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("another disk")

    behind = EncodingCache(tmp_path / "behind")
    cache = EncodingCache(tmp_path / "own", behind)
    behind.write("ab12", {"latents": torch.ones(2)})
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    cache.fetch("ab12")
    assert not cache.path("ab12").samefile(behind.path("ab12"))
    assert cache.path("ab12").read_bytes() == behind.path("ab12").read_bytes()


def test_an_entry_that_is_gone_cannot_be_fetched(tmp_path):
    with pytest.raises(DiffSynthError, match="cannot write"):
        EncodingCache(tmp_path / "own", EncodingCache(tmp_path / "behind")).fetch("ab12")
