"""The page of benchmarks, docs/benchmarks.md: `python -m tests.gpu.page` writes it without a figure."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from diffsynth_core.progress import format_memory
from tests.gpu.measure import Outcome
from tests.gpu.rows import ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
PEAKS = {
    "B200": (2250e12, "NVIDIA DGX B200 data sheet: 4.5 PFLOPS with sparsity"),
    "H200": (989.4e12, "NVIDIA H200 data sheet: 1,979 TFLOPS with sparsity"),
    "H100 PCIe": (756e12, "NVIDIA H100 data sheet: 1,513 TFLOPS with sparsity"),
    "H100": (989.4e12, "NVIDIA H100 Tensor Core GPU Architecture, SXM5"),
    "A100": (312e12, "NVIDIA A100 data sheet"),
    "RTX 4090": (165.2e12, "NVIDIA Ada GPU Architecture, float32 accumulation"),
    "RTX 3090": (71e12, "NVIDIA Ampere GA102 GPU Architecture, float32 accumulation"),
}
"""Part of a device's name, the first match counts -> operations per second of dense matrix products in bf16; source."""
HEAD = """\
# Speed and memory, measured on a GPU

{device}

`make bench-gpu` measures on the first CUDA device and writes this page again after each row; stopped, it continues where
it was. It needs this checkout and, of packages, those of `pyproject.toml`; no model files: modules of published sizes get
random weights on the device, are prepared as `diffsynth train` prepares them, and take steps on one random micro-batch of
1024 x 1024 pixels unless a row says otherwise. Encoders, files and data loading are not part of it. Rows come in the order
of the tables, each in a process of its own; `ARGUMENTS="--minutes 12"` limits all of them together.

- share of the limit = FLOP of a step / (seconds of a step x FLOP per second of the GPU in dense bf16)
- FLOP of a step: matrix products by formula from shapes (`core/diffsynth_core/planning/memory/flops.py`). A linear layer of P
  weights and T tokens is 2 P T forward, 2 P T for the gradient of its input, and 2 P T for that of its weight if it trains;
  attention of S tokens, H numbers wide, is 4 S^2 H forward and 10 S^2 H backward; gradient checkpointing adds what it
  computes again. Products in 8 bits and dequantization count the same, so that shares of one model compare by time.
- estimate: memory of the training step in `train --dry_run`; peak: `torch.cuda.max_memory_allocated` of the steps
"""


def device_peak(name: str) -> float | None:
    """Return the operations per second of a GPU in dense bf16; None if unknown."""
    return next((peak for part, (peak, _) in PEAKS.items() if all(word in name for word in part.split())), None)


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the page with a line for each row that has an outcome."""
    devices = dict.fromkeys(f"{one.device}, torch {one.torch}, {one.size} size" for one in outcomes if one.device)
    told = "; ".join(devices)
    device = f"Measured on: {told}." if told else "No GPU has been measured yet."
    found = {one.row: one for one in outcomes}
    rows = [(row, found[row.name]) for row in ROWS if row.name in found]
    lines = [HEAD.format(device=device), *(_correctness(rows) if rows else ()), *(_speed(rows) if rows else ())]
    lines += ["| GPU | TFLOP per second, dense bf16 | source |", "|---|---|---|"]
    lines += [f"| {name} | {peak / 1e12:g} | {source} |" for name, (peak, source) in PEAKS.items()]
    return "\n".join([*lines, ""])


def _correctness(rows: Sequence[tuple[Row, Outcome]]) -> Iterator[str]:
    yield "| same losses as plain steps | largest relative difference | allowed | |"
    yield "|---|---|---|---|"
    for row, one in rows:
        if row.tolerance is not None:
            wrong = one.difference is None or not one.difference <= row.tolerance
            verdict = one.fault or ("**differs**" if wrong else "same")
            yield f"| {row.name} | {_number(one.difference, '.2g')} | {row.tolerance:g} | {verdict} |"
    yield ""


def _speed(rows: Sequence[tuple[Row, Outcome]]) -> Iterator[str]:
    yield "| row | steps/s | TFLOP of a step | share of the limit | peak | estimate | |"
    yield "|---|---|---|---|---|---|---|"
    for row, one in rows:
        if row.tolerance is None:
            peak = device_peak(one.device)
            rate = 1 / one.seconds if one.seconds else None
            share = one.flops * rate / peak if one.flops and rate and peak else None
            figures = (_number(rate, ".3g"), _number(one.flops and one.flops / 1e12, ".4g"), _number(share, ".0%"))
            memory = (format_memory(size) if size is not None else "-" for size in (one.peak, one.estimate))
            yield f"| {' | '.join((row.name, *figures, *memory, one.fault))} |"
    yield ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    PAGE.write_text(page(()), encoding="utf-8")
