"""Measures all rows on a GPU and writes docs/benchmarks.md: `python -m tests.gpu.bench`, or `make bench-gpu`."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "yaml", "PIL")
ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rows that have no outcome yet, in order, as long as there is time."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"missing packages: {', '.join(missing)}", file=sys.stderr)
        return 1
    if importlib.util.find_spec("diffsynth_core") is None:
        sys.path.insert(0, str(ROOT / "core"))  # the checkout is not installed
    from tests.gpu.measure import Outcome
    from tests.gpu.page import PAGE, page
    from tests.gpu.rows import ROWS

    asked = parse(arguments, PAGE)
    if asked.size == "real" and not cuda_is_there():
        print("no CUDA device is there; `--size rehearsal` runs every row on tiny models on a CPU", file=sys.stderr)
        return 1
    asked.work.mkdir(parents=True, exist_ok=True)
    results, ends = asked.work / f"{asked.size}.jsonl", time.monotonic() + 60 * asked.minutes
    outcomes = [Outcome(**found) for found in read_lines(results)]
    rows = [row for row in ROWS if not asked.only or row.name in asked.only]
    for row in rows:
        left = ends - time.monotonic()
        if left <= 0:
            print(f"out of time; continue with the same command, which keeps {results}", file=sys.stderr)
            break
        if any(done.row == row.name for done in outcomes):
            continue
        print(f"{row.name} …", file=sys.stderr, flush=True)
        limit = 60 * row.minutes
        outcome = measured(row.name, asked.size, asked.work, min(limit, left))
        if outcome is None and left < limit:
            continue  # the time of all rows ended, not that of this one
        outcomes.append(Outcome(**(outcome or {"row": row.name, "size": asked.size, "fault": f"over {limit:g} s"})))
        append_line(results, vars(outcomes[-1]))
        asked.out.write_text(page(outcomes), encoding="utf-8")
        print(f"  {outcomes[-1]}", file=sys.stderr, flush=True)
    return 0


def parse(arguments: Sequence[str] | None, page: Path) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bench")
    parser.add_argument("--out", type=Path, help="page to write; default: docs/benchmarks.md, of a rehearsal in --work")
    parser.add_argument("--minutes", type=float, default=120, help="of all rows; a row that is running is stopped")
    parser.add_argument("--size", choices=("real", "rehearsal"), default="real", help="rehearsal: tiny models on a CPU")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-gpu", help="folder of results and headers")
    parser.add_argument("--only", nargs="+", default=(), help="names of rows; default: all")
    asked = parser.parse_args(arguments)
    asked.out = asked.out or (page if asked.size == "real" else asked.work / page.name)
    return asked


def cuda_is_there() -> bool:
    """Whether torch finds a CUDA device; in another process, because one that has used a device holds memory of it."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, check=False).returncode == 0


def measured(name: str, size: str, work: Path, seconds: float) -> dict[str, object] | None:
    """Return the outcome of a row as JSON; None if its process did not end in time."""
    command = [sys.executable, "-m", "tests.gpu.measure", name, size, str(work)]
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "core", os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT, env=environment
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        outcome: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return outcome
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"row": name, "size": size, "fault": last.replace("|", "/")[:200]}


def read_lines(path: Path) -> list[dict[str, object]]:
    """Return the outcomes in a file; a line that was not written to its end is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append_line(path: Path, outcome: dict[str, object]) -> None:
    """Add an outcome to a file, in the place of an unfinished line."""
    lines = [json.dumps(found) + "\n" for found in (*read_lines(path), outcome)]
    written = path.with_suffix(".part")
    written.write_text("".join(lines), encoding="utf-8")
    written.replace(path)


if __name__ == "__main__":
    sys.exit(main())
