"""What must never happen in commands that write weight files: a traceback, a damaged input, a partial output.

A further command only needs an entry in the table of command lines.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.models.qwen_image.keys import TEXT_ENCODER_FILES
from diffsynth_core.weights import weight_writer as rewriting
from tests.conftest import MODEL_ID
from tests.corruption import corrupt
from tests.loras import RANK

CORRUPTED = int(os.environ.get("DIFFSYNTH_TEST_CORRUPTED", "50"))
"""Damaged headers for each command, different ones for each: 200 in total."""
KILLS = int(os.environ.get("DIFFSYNTH_TEST_KILLS", "2"))
"""Moments at which each command is killed."""
TRIES = 5
"""Attempts for each of these moments: the kill may come too late."""


@dataclass(frozen=True)
class Command:
    """A command line. `{checkpoint}`, `{out}` … are filled in; faults are planted into `inputs`."""

    words: tuple[str, ...]
    inputs: tuple[str, ...]


COMMANDS = {
    "split": Command(("split-ckpt", "{checkpoint}", "--output_path", "{out}"), ("checkpoint",)),
    "split, renamed": Command(
        ("split-ckpt", "{checkpoint}", "--output_path", "{out}", "--layout", "original"), ("checkpoint",)
    ),
    "split by size": Command(
        ("split-ckpt", "{checkpoint}", "--output_path", "{out}", "--by", "size", "--max_shard_size", "{size}"),
        ("checkpoint",),
    ),
    "join": Command(("split-ckpt", "{checkpoint}", "--output_path", "{out}", "--join"), ("checkpoint",)),
    "merge": Command(
        ("merge-lora", "--base", "{base}", "--lora", "{lora}", "--output_path", "{out}/merged.safetensors"),
        ("base", "lora"),
    ),
    "convert": Command(
        ("convert-lora", "{lora}", "--to", "kohya", "--family", "qwen-image", "-o", "{out}/converted.safetensors"),
        ("lora",),
    ),
}


def write_checkpoint(place: Path, base: Path, copies: int = 1) -> None:
    """Write a text encoder in full and a LoRA, as a run of Qwen-Image does; `copies` make it larger."""
    tensors = {}
    for file in sorted((base / MODEL_ID / "text_encoder").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            (key,) = TEXT_ENCODER_FILES.to_targets(name)
            tensors[f"pipe.text_encoder.{key}"] = tensor.repeat(copies, *[1] * (tensor.dim() - 1)).contiguous()
    lora = "transformer_blocks.0.attn.to_q.lora_{}.default.weight"
    tensors |= {lora.format("A"): torch.ones(RANK, 8), lora.format("B"): torch.zeros(8 * copies, RANK)}
    reported = {
        "family": "qwen-image",
        "removed_prefix": "pipe.dit.",
        "lora_component": "dit",
        "lora_format": "diffsynth",
    }
    save_file(tensors, place, reported)


def write_base_and_lora(base: Path, lora: Path, models: Path, copies: int = 1) -> None:
    """Write a transformer of Qwen-Image and a LoRA on its attention; `copies` make them larger."""
    tensors = {}
    for file in sorted((models / MODEL_ID / "transformer").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor.repeat(copies, *[1] * (tensor.dim() - 1)).contiguous()
    save_file(tensors, base)
    halves = {}
    for name, tensor in tensors.items():
        if name.endswith(("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")):
            stem = name.removesuffix(".weight")
            halves[f"{stem}.lora_A.default.weight"] = torch.ones(RANK * copies, tensor.shape[1])
            halves[f"{stem}.lora_B.default.weight"] = torch.ones(tensor.shape[0], RANK * copies)
    save_file(halves, lora)


def write_inputs(folder: Path, models: Path, copies: int = 1) -> dict[str, Path]:
    places = {name: folder / f"{name}.safetensors" for name in ("checkpoint", "base", "lora")}
    write_checkpoint(places["checkpoint"], models, copies)
    write_base_and_lora(places["base"], places["lora"], models, min(copies, 20))
    return places


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny_models) -> dict[str, Path]:
    """Valid inputs by name."""
    return write_inputs(tmp_path_factory.mktemp("originals"), tiny_models)


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_models) -> dict[str, Path]:
    """Inputs that take long enough to kill the command meanwhile."""
    return write_inputs(tmp_path_factory.mktemp("large"), tiny_models, copies=100)


def words(command: Command, out: Path | str, inputs: dict[str, Path], *more: str) -> list[str]:
    size = inputs["checkpoint"].stat().st_size // 3 + 1000
    return [*(word.format(out=out, size=size, **inputs) for word in command.words), *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files under final names and their content."""
    files = sorted(folder.rglob("*")) if folder.exists() else []
    return {path.name: path.read_bytes() for path in files if path.is_file() and not path.name.endswith(".tmp")}


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tmp"))


def assert_whole(folder: Path) -> None:
    """Check that every file under a final name is complete."""
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_corrupted_headers(cli, originals, name, tmp_path):
    """Each is rejected with a message, or accepted if it is still meaningful."""
    command, refused = COMMANDS[name], 0
    first = list(COMMANDS).index(name) * CORRUPTED
    for seed in range(first, first + CORRUPTED):
        folder = tmp_path / "seed"
        folder.mkdir()
        inputs = {key: Path(shutil.copy(path, folder)) for key, path in originals.items()}
        damaged = inputs[command.inputs[seed % len(command.inputs)]]
        damaged.write_bytes(corrupt(damaged.read_bytes(), seed))
        before = {path: path.read_bytes() for path in inputs.values()}
        outcome = cli(*words(command, folder / "out", inputs))
        assert outcome.code in (0, 1), (seed, outcome.err)
        assert "internal error" not in outcome.err and "Traceback" not in outcome.err, (seed, outcome.err)
        assert {path: path.read_bytes() for path in inputs.values()} == before, seed
        assert leftovers(folder) == [], seed
        if outcome.code:
            refused += 1
            assert outcome.err.startswith("error: ") and not (folder / "out").exists(), (seed, outcome.err)
        else:
            assert contents(folder / "out"), seed
            assert_whole(folder / "out")
        shutil.rmtree(folder)
    assert refused > CORRUPTED / 2


WAYS = ("path", "hard link", "symlink", "linked folder")
NEVER_AT_THEIR_INPUT = ("split by size",)
"""Commands whose outputs have other names than the input, so that only a link makes them equal."""


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in COMMANDS for way in WAYS if name not in NEVER_AT_THEIR_INPUT or way.endswith("link")],
)
def test_no_input_is_written_over(cli, originals, name, way, tmp_path):
    """If an output would be an input, by any name, nothing is written, with or without `--overwrite`."""
    command = COMMANDS[name]
    assert cli(*words(command, tmp_path / "sound", originals)).code == 0
    inputs = {key: Path(shutil.copy(path, tmp_path)) for key, path in originals.items()}
    victim, out = inputs[command.inputs[0]], tmp_path / "out"
    names = sorted(contents(tmp_path / "sound"))
    place = out / (victim.name if victim.name in names else names[0])
    if way == "linked folder":
        (tmp_path / "real").mkdir()
        out.symlink_to(tmp_path / "real")
    else:
        out.mkdir()
    if way in ("path", "linked folder"):
        inputs[command.inputs[0]] = victim = victim.rename(out.resolve() / place.name)
    elif way == "hard link":
        place.hardlink_to(victim)
    else:
        place.symlink_to(victim)
    before = victim.read_bytes()
    outcome = cli(*words(command, out, inputs, "--overwrite"))
    assert outcome.code == 1
    assert f"error: `{place}` would overwrite the input `{victim}`" in outcome.err
    assert victim.read_bytes() == before
    assert [path.name for path in out.iterdir()] == [place.name]


def start(arguments: list[str], **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffsynth_cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def seconds_of(arguments: list[str]) -> float:
    """Return the duration of a command that succeeds."""
    begun = time.monotonic()
    with start(arguments) as process:
        process.wait()
    assert process.returncode == 0
    return time.monotonic() - begun


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment(large, name, tmp_path):
    """Files under final names are complete, inputs are unchanged, and the next run removes leftovers."""
    command, drawn = COMMANDS[name], random.Random(0)
    arguments = words(command, tmp_path / "out", large, "--overwrite")
    seconds_of(words(command, tmp_path / "whole", large))  # the first reads modules and inputs from the disk
    seconds = seconds_of(words(command, tmp_path / "whole", large, "--overwrite"))
    expected = contents(tmp_path / "whole")
    before = {path: path.read_bytes() for path in large.values()}
    killed = 0
    for _ in range(TRIES * KILLS):
        with start(arguments) as process:
            time.sleep(drawn.uniform(0.3, 1) * seconds)
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        found = contents(tmp_path / "out")
        assert all(found[file] == expected[file] for file in found)
        if killed == KILLS:
            break
        if process.returncode == 0:
            seconds *= 0.9  # others use the processor less than they did
    assert killed == KILLS
    seconds_of(arguments)
    assert contents(tmp_path / "out") == expected
    assert leftovers(tmp_path / "out") == []
    assert {path: path.read_bytes() for path in large.values()} == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_may_not_grow(large, name, tmp_path):
    """The system fails in the middle of a file, as with a full disk: RLIMIT_FSIZE."""
    limit = 100_000

    def forbid() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert all(path.stat().st_size > limit for path in large.values())
    with start(words(COMMANDS[name], tmp_path / "out", large), preexec_fn=forbid) as process:
        _, reported = process.communicate()
    assert process.returncode == 1
    assert "error: cannot write `" in reported and "File too large" in reported and "Traceback" not in reported
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path, large):
    """A file system with less space than the inputs have bytes."""
    folder, room = tmp_path / "disk", min(path.stat().st_size for path in large.values()) // 2
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "filled by others"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(cli, large, small_disk, name, checked, monkeypatch):
    if not checked:
        monkeypatch.setattr(rewriting, "_space_problems", lambda outputs: [])
    outcome = cli(*words(COMMANDS[name], small_disk / "out", large))
    assert outcome.code == 1
    assert (" free, " if checked else "No space left on device") in outcome.err
    assert list(small_disk.iterdir()) == []
