"""Generation of docs/gpu_memory.md from the recipes."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.files import write_text
from diffsynth_core.planning.fitting import MemoryFit, find_fit
from diffsynth_core.planning.memory_config import memory_config
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.planning.sizes import find_workload
from diffsynth_core.progress import SilentReporter, format_memory

PAGE = "gpu_memory.md"
"""Name of the page."""
GPUS = ("24GB", "48GB", "80GB")
"""Memory sizes of common rented GPUs."""


def memory_page() -> str:
    """Return `docs/gpu_memory.md`: estimates of all recipes with their default parameters."""
    rows = [row for recipe in recipe_names() for row in memory_rows(recipe)]
    return "\n".join([*page_head(), *rows]) + "\n"


def page_head() -> list[str]:
    """Return the lines above the rows of the recipes."""
    return [
        "# GPU memory of the recipes",
        "",
        "Generated from the plans of the recipes by `make docs`; a test fails when this page is out of date.",
        "",
        "Estimates of `diffsynth train --recipe NAME --dry_run --gpu_memory 24GB`: in bf16, for the largest images or clips",
        "that the recipe allows, with batch size 1. Your own dataset and parameters change them, and the plan prints the",
        "flags for the changes named here. Kernel workspace and driver overhead are not included: leave some headroom.",
        "[memory.md](memory.md) compares such estimates with measurements, on tiny models and on a CPU; on GPUs they have",
        "not been measured. `tight`: fits, with less than 1 GiB left for overhead.",
        "",
        "The third and later columns state what has to change for a GPU of that size. Full training keeps weights,",
        "gradients and the two states of AdamW in float32, 16 bytes per parameter, and 4 more during the AdamW step.",
        "",
        f"| recipe | needs | {' | '.join(GPUS)} |",
        f"|---|---|{'---|' * len(GPUS)}",
    ]


def memory_rows(recipe: str) -> Iterator[str]:
    """Return a row for each stage of a recipe, estimated without model files and without a dataset."""
    for resolved in resolve_stages({"recipe": recipe, "dry_run": True}, ()):
        with tempfile.TemporaryDirectory() as empty, chdir(empty):  # a default dataset would change the plan
            plan = make_plan(resolved, SilentReporter(), without_files=True)
        config = memory_config(plan, find_workload(plan).largest)
        fits = [find_fit(plan, config, memory_bytes(size)) for size in GPUS]
        stage = f", stage `{resolved.stage}`" if resolved.stage else ""
        yield f"| `{recipe}`{stage} | {format_memory(fits[0].peak)} | {' | '.join(_in_words(fit) for fit in fits)} |"


def _in_words(fit: MemoryFit) -> str:
    if not fit.fits:
        return "does not fit"
    words = "unchanged" if fit.fits_unchanged else "; ".join(dict.fromkeys(change.words for change in fit.changes))
    return f"{words} (tight)" if fit.is_tight else words


def write_documents(folder: Path) -> None:
    """Write the page into the documentation folder of a checkout."""
    write_text(folder / PAGE, memory_page())


if __name__ == "__main__":
    write_documents(Path(sys.argv[1]))
