"""Large weight files for benchmarks of the commands that write such files, and the cost of a process."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from diffsynth_core.weights.headers import make_header

GIGABYTE = 10**9
BLOCK = 64 * 1024**2
SAMPLE_SECONDS = 0.01
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cost:
    """Wall seconds of a process, and its peak anonymous memory: private pages that map no file."""

    seconds: float
    anonymous_bytes: int


def write_weights(path: Path, shapes: Shapes, metadata: Mapping[str, str], dtype: str = "BF16") -> None:
    """Write bfloat16 weights with a standard deviation of 0.02, repeating one block of normal numbers."""
    block = (torch.randn(BLOCK // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    data = memoryview(block.view(torch.uint8).numpy()).cast("B")
    header = make_header([(name, dtype, shape) for name, shape in shapes.items()], metadata)
    left = sum(torch.Size(shape).numel() for shape in shapes.values()) * 2
    with path.open("wb") as stream:
        stream.write(header)
        while left:
            left -= stream.write(data[: min(left, BLOCK)])


def write_two_shards(folder: Path, stem: str, shapes: Shapes, metadata: Mapping[str, str]) -> list[Path]:
    """Write `shapes` to two files of about the same size, without an index."""
    folder.mkdir(parents=True)
    half, first, second = sum(torch.Size(shape).numel() for shape in shapes.values()) / 2, {}, {}
    filled = 0
    for name, shape in shapes.items():
        (first if filled < half else second)[name] = shape
        filled += torch.Size(shape).numel()
    paths = [folder / f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for path, part in zip(paths, (first, second), strict=True):
        write_weights(path, part, metadata)
    return paths


def run(arguments: Iterable[object]) -> Cost:
    """Run a `diffsynth` command in a process."""
    os.sync()  # what others have left to write does not count
    started, most = time.perf_counter(), 0
    command = [sys.executable, "-m", "diffsynth_cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, _anonymous(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    return Cost(seconds, most)


def _anonymous(process: int) -> int:
    """Return the bytes of resident anonymous memory (`RssAnon`)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def copy_seconds(paths: Iterable[Path], folder: Path, synced: bool) -> float:
    """Return the wall seconds of `cp`, with its copies on disk if `synced`; the copies are deleted."""
    os.sync()
    folder.mkdir()
    started = time.perf_counter()
    for path in paths:
        subprocess.run(["cp", path, folder], check=True)
        if synced:
            subprocess.run(["sync", folder / path.name], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds
