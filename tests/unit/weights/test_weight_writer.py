"""Derived weight files: bytes preserved, all files or none, and never over an input."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights import weight_writer as rewriting
from diffsynth_core.weights.weight_sets import open_weights
from diffsynth_core.weights.weight_writer import (
    OutputFile,
    OutputTensor,
    output_problems,
    plan_shards,
    write_outputs,
)


@pytest.fixture
def base(tmp_path):
    """A file with three tensors of different dtypes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "one": torch.arange(3, dtype=torch.int8),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt"})
    return open_weights([tmp_path / "base.safetensors"])


def copied(base, names=None):
    return tuple(
        OutputTensor(name, base.tensors[name].dtype, base.tensors[name].shape, base.spans[name])
        for name in names or base.tensors
    )


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("by_system", [True, False])
def test_copied_tensors_are_equal_to_the_bit(tmp_path, base, by_system, monkeypatch):
    if not by_system:
        monkeypatch.delattr(os, "copy_file_range")
    names = ["one", "half", "wide", "none"]
    files, indexes = plan_shards(tmp_path / "out", "model", copied(base, names), {"said": "so"}, None)
    write_outputs(files, base.inputs, SilentReporter())
    assert not indexes
    written, original = load_file(files[0].path), load_file(base.files[0])
    assert written.keys() == original.keys()
    assert all(written[name].equal(original[name]) and written[name].dtype == original[name].dtype for name in written)
    assert leftovers(tmp_path / "out") == []


def test_tensors_made_in_pieces(tmp_path, base):
    values = torch.randn(4, 2)
    data = values.numpy().tobytes()
    made = OutputTensor("made", "F32", (4, 2), lambda: (data[begin : begin + 5] for begin in range(0, len(data), 5)))
    write_outputs([OutputFile(tmp_path / "x.safetensors", (made, *copied(base)))], base.inputs, SilentReporter())
    assert load_file(tmp_path / "x.safetensors")["made"].equal(values)


def test_shards_and_their_index(tmp_path, base):
    files, indexes = plan_shards(tmp_path, "model", copied(base), {}, 20)
    write_outputs([*files, *indexes], base.inputs, SilentReporter())
    found = open_weights([indexes[0].path])
    assert [path.name for path in found.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert found.index_metadata == {"total_size": base.nbytes}
    assert json.loads(indexes[0].path.read_text())["weight_map"].keys() == base.tensors.keys()


@pytest.mark.parametrize("way", ["path", "symlink", "hard link", "linked folder"])
def test_nothing_is_written_over_an_input(tmp_path, base, way):
    place = tmp_path / "out.safetensors"
    if way == "path":
        place = base.files[0]
    elif way == "symlink":
        place.symlink_to(base.files[0])
    elif way == "hard link":
        place.hardlink_to(base.files[0])
    else:
        (tmp_path / "linked").symlink_to(tmp_path)
        place = tmp_path / "linked" / base.files[0].name
    before = base.files[0].read_bytes()
    with pytest.raises(DiffSynthError, match="would overwrite the input"):
        write_outputs([OutputFile(place, copied(base))], base.inputs, SilentReporter(), overwrite=True)
    assert base.files[0].read_bytes() == before


def test_what_is_there_is_replaced_when_asked_alone(tmp_path, base):
    place = tmp_path / "out.safetensors"
    place.write_text("mine")
    with pytest.raises(DiffSynthError, match="already exists"):
        write_outputs([OutputFile(place, copied(base))], base.inputs, SilentReporter())
    assert place.read_text() == "mine"
    write_outputs([OutputFile(place, copied(base))], base.inputs, SilentReporter(), overwrite=True)
    assert load_file(place).keys() == base.tensors.keys()


@pytest.mark.parametrize("count", [2, 1])
@pytest.mark.parametrize("overwrite", [True, False])
def test_other_files_of_the_same_model_are_not_left_beside(tmp_path, base, overwrite, count):
    """Shards of another count and their index, or a single file next to shards; files with other names may stay."""
    others = ["out-00001-of-00003.safetensors", "out-00003-of-00003.safetensors"]
    others += ["out.safetensors.index.json" if count == 1 else "out.safetensors"]
    folder = tmp_path / "there"
    folder.mkdir()
    for name in [*others, "out.lora.safetensors", "out-2.safetensors", "out.json", "output.safetensors"]:
        (folder / name).write_text("mine")
    before = sorted(folder.iterdir())
    files, indexes = plan_shards(folder, "out", copied(base), {}, 20 if count == 2 else None)
    with pytest.raises(DiffSynthError) as raised:
        write_outputs([*files, *indexes], base.inputs, SilentReporter(), overwrite)
    (problem,) = raised.value.problems
    assert problem.message == (
        f"`{folder}` contains other files of a model `out`, which would be read as parts of this one: "
        + ", ".join(f"`{name}`" for name in others)
    )
    assert problem.hint == "delete them, or choose another `--output_path`"
    assert sorted(folder.iterdir()) == before
    for name in others:
        (folder / name).unlink()
    write_outputs([*files, *indexes], base.inputs, SilentReporter(), overwrite)


def test_an_input_may_stand_beside_its_shards(tmp_path, base):
    files, indexes = plan_shards(tmp_path, base.files[0].stem, copied(base), {}, 20)
    write_outputs([*files, *indexes], base.inputs, SilentReporter())
    assert base.files[0].exists() and len(files) == 2


def test_too_little_space_is_told_first(tmp_path, base, monkeypatch):
    usage = rewriting.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rewriting.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DiffSynthError, match=r"has 10 B free, but .* are needed"):
        write_outputs([OutputFile(tmp_path / "out" / "x.safetensors", copied(base))], base.inputs, SilentReporter())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written_to_is_told_first(tmp_path, base, monkeypatch):
    """Root may write anywhere, so the system's answer is replaced."""
    asked = []
    monkeypatch.setattr(rewriting.os, "access", lambda *arguments: asked.append(arguments))
    (problem,) = output_problems([OutputFile(tmp_path / "a" / "b" / "x.safetensors", copied(base))], base.inputs)
    assert problem.message == f"`{tmp_path}` is not writable"
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_an_input_that_shrinks_leaves_nothing(tmp_path, base):
    with base.files[0].open("r+b") as stream:
        stream.truncate(base.files[0].stat().st_size - 4)
    with pytest.raises(DiffSynthError, match="was truncated while it was read"):
        write_outputs([OutputFile(tmp_path / "x.safetensors", copied(base))], base.inputs, SilentReporter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]


def test_what_is_made_wrong_does_not_get_its_name(tmp_path, base):
    made = OutputTensor("made", "F32", (4,), lambda: [b"too short"])
    with pytest.raises(DiffSynthError):
        write_outputs([OutputFile(tmp_path / "x.safetensors", (made,))], base.inputs, SilentReporter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]


def test_leftovers_of_a_killed_process_go(tmp_path, base):
    dead = tmp_path / ".x.safetensors.4194305-abcd.tmp"
    alive = tmp_path / f".x.safetensors.{os.getpid()}-abcd.tmp"
    dead.touch()
    alive.touch()
    write_outputs([OutputFile(tmp_path / "x.safetensors", copied(base))], base.inputs, SilentReporter())
    assert leftovers(tmp_path) == [alive.name]
