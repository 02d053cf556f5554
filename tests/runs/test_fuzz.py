"""Mutated files through the real commands: exit codes 0, 1 and 2 only, no internal error, no partial file.

Each case is a valid file, damaged by a few mutations drawn from the case's number, and a command that reads it. CI
runs the same cases each time, as many as fit into `SECONDS`; `DIFFSYNTH_FUZZ_SECONDS` runs longer, and
`DIFFSYNTH_FUZZ_FIRST` starts at another number. A failure names the case: `DIFFSYNTH_FUZZ_FIRST=N` repeats it.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.outcome import Outcome

SECONDS = 20
FIRST = int(os.environ.get("DIFFSYNTH_FUZZ_FIRST", "0"))
MODEL = "Qwen/Qwen-Image"
TRAIN = ("train", "--recipe", "qwen-image-lora", "--device", "cpu", "--dataset_num_workers", "0", "--dry_run")
VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    10**20,
    10**400,
    "",
    "x",
    "\x1b[31m\u202e",
    "\udcff",
    [],
    {},
    [[]],
    {"a": []},
    "n" * 5000,
)
"""Replacements for JSON values."""
TEXTS = (
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b'"',
    b"{",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\n",
    b",",
    b": &a [*a]",
)
"""Strings inserted into bytes."""


@dataclass(frozen=True)
class Case:
    """A file below the folder of the command, and the command that reads it."""

    file: str
    arguments: tuple[str, ...]


CASES = (
    Case("dataset/metadata.csv", ("dataset", "validate", "dataset", "--depth", "paths")),
    Case("dataset/metadata.csv", (*TRAIN, "--dataset_base_path", "dataset")),
    Case("rows/metadata.json", ("dataset", "validate", "rows", "--depth", "paths", "--format", "json")),
    Case("rows/metadata.json", (*TRAIN, "--dataset_base_path", "rows")),
    Case("lines/metadata.jsonl", ("dataset", "validate", "lines", "--depth", "paths")),
    Case("mine.yaml", (*TRAIN, "--config", "mine.yaml")),
    Case("recipe.yaml", ("recipe", "show", "recipe.yaml")),
    Case(
        "lora.safetensors", ("convert-lora", "lora.safetensors", "--to", "comfyui", "-o", "out/converted.safetensors")
    ),
    Case("lora.safetensors", (*TRAIN, "--dataset_base_path", "dataset", "--lora_checkpoint", "lora.safetensors")),
    Case("base.safetensors", ("split-ckpt", "base.safetensors", "--output_path", "out", "--max_shard_size", "1kB")),
    Case(
        "lora.safetensors",
        ("merge-lora", "--base", "base.safetensors", "--lora", "lora.safetensors", "--output_path", "out/merged"),
    ),
    Case("run/run.json", (*TRAIN, "--dataset_base_path", "dataset", "--output_path", "run", "--resume", "auto")),
    Case(f"models/{MODEL}/vae/config.json", (*TRAIN, "--dataset_base_path", "dataset")),
    Case(f"models/{MODEL}/transformer/config.json", (*TRAIN, "--dataset_base_path", "dataset")),
    Case(f"models/{MODEL}/tokenizer/tokenizer_config.json", (*TRAIN, "--dataset_base_path", "dataset")),
    Case(f"models/{MODEL}/vae/diffusion_pytorch_model.safetensors", (*TRAIN, "--dataset_base_path", "dataset")),
)


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Mutate bytes without regard to the format."""
    place = draw.randrange(len(content) + 1)
    other = draw.randrange(len(content) + 1)
    match draw.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + draw.choice(TEXTS) + content[place:]
        case 2:
            return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
        case 3:
            return content[: min(place, other)] + content[max(place, other) :]
        case _:
            return content[:place] + content[min(place, other) : max(place, other)] + content[place:]


def key_paths(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Return the paths of all values within a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from key_paths(inner, (*path, key))


def mutate_json(value: object, draw: random.Random) -> object:
    """Replace or remove one value within a JSON value."""
    found = list(key_paths(value))
    if not found or draw.random() < 0.05:
        return draw.choice(VALUES)
    *way, last = draw.choice(found)
    inner = value
    for key in way:
        inner = inner[key]
    if draw.random() < 0.3:
        del inner[last]
    elif isinstance(inner, dict) and draw.random() < 0.3:
        inner[f"{last}{draw.choice(('x', chr(27), ' '))}"] = inner.pop(last)
    else:
        inner[last] = draw.choice(VALUES)
    return value


def mutate(content: bytes, name: str, draw: random.Random) -> bytes:
    """Damage a file: by its structure if it is JSON or starts with it, otherwise by its bytes."""
    for _ in range(draw.randint(1, 3)):
        structure = name.endswith((".json", ".yaml", ".safetensors")) and draw.random() < 0.7
        try:
            if not structure:
                content = mutate_bytes(content, draw)
            elif name.endswith(".safetensors"):
                length = int.from_bytes(content[:8], "little")
                header = json.dumps(mutate_json(json.loads(content[8 : 8 + length]), draw)).encode()
                content = len(header).to_bytes(8, "little") + header + content[8 + length :]
            else:
                content = json.dumps(mutate_json(json.loads(content), draw), indent=1).encode()
        except (ValueError, TypeError, RecursionError):  # damaged already
            content = mutate_bytes(content, draw)
    return content


@pytest.fixture
def folder(cli, dataset: Path, models: Path, tiny_models: Path) -> Path:
    """The valid files of the cases, in the folder where the commands run."""
    here = Path.cwd()
    shutil.copytree(dataset, "dataset")
    rows = [{"image": f"../dataset/{name}.png", "prompt": f"a {name}"} for name in ("astronaut", "coffee")]
    for name, text in (
        ("rows/metadata.json", json.dumps(rows)),
        ("lines/metadata.jsonl", "\n".join(map(json.dumps, rows))),
    ):
        Path(name).parent.mkdir()
        Path(name).write_text(text)
    settings = {"dataset_base_path": "dataset", "learning_rate": 0.001, "max_steps": 2, "lora_target_modules": ["to_q"]}
    Path("mine.yaml").write_text(json.dumps({"parameters": settings}, indent=1))
    Path("recipe.yaml").write_text(
        json.dumps({"name": "recipe", "description": "mine", "parameters": {"task": "sft", **settings}}, indent=1)
    )
    module = "transformer_blocks.0.attn.to_q"
    halves = {f"{module}.lora_A.default.weight": (4, 32), f"{module}.lora_B.default.weight": (32, 4)}
    save_file({name: np.ones(shape, np.float32) for name, shape in halves.items()}, "lora.safetensors", {"rank": "4"})
    save_file({f"{module}.weight": np.ones((32, 32), np.float32), "b": np.ones(3, np.float32)}, "base.safetensors")
    Path("models").symlink_to(models)
    arguments = [word for word in TRAIN if word != "--dry_run"]
    outcome = cli(*arguments, "--dataset_base_path", "dataset", "--output_path", "run", "--max_steps", "1")
    assert outcome.code == 0, outcome.err
    return here


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def fault_of(outcome: Outcome, new: set[Path]) -> str | None:
    """Return what is wrong with how a command ended; `new`: files that it left."""
    text = outcome.out + outcome.err
    if outcome.code not in (0, 1, 2):
        return f"exit code {outcome.code}"
    if "internal error" in text or "Traceback" in text:
        return "a fault of ours"
    if outcome.code and not text.strip():
        return "no message"
    if "\x1b" in text:
        return "a control character"
    half = [path.name for path in new if outcome.code or path.name.endswith(".tmp")]
    return f"left {half}" if half else None


def test_damaged_files_end_in_a_message(folder: Path, cli: Callable[..., Outcome]):
    originals = {case.file: (folder / case.file).read_bytes() for case in CASES}
    before = files_below(folder)
    end = time.monotonic() + float(os.environ.get("DIFFSYNTH_FUZZ_SECONDS", SECONDS))
    faults = []
    number = FIRST
    while number == FIRST or time.monotonic() < end:
        case = CASES[number % len(CASES)]
        path = folder / case.file
        path.write_bytes(mutate(originals[case.file], case.file, random.Random(number)))
        reported = f"case {number} ({case.file}; {' '.join(case.arguments)})"
        try:
            outcome = cli(*case.arguments)
        except Exception as error:
            faults.append(f"{reported}: {type(error).__name__}: {error}")
        else:
            if fault := fault_of(outcome, files_below(folder) - before):
                faults.append(f"{reported}: {fault}\n{outcome.err[-600:]}")
        path.write_bytes(originals[case.file])
        for new in files_below(folder) - before:
            new.unlink()
        number += 1
    print(f"{number - FIRST} cases, {len(faults)} faults")
    assert not faults, "\n\n".join(faults[:20])
