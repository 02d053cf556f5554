"""Generation of docs/gpu_memory.md from the recipes."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.config.recipes import load_recipe, recipe_names
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.files import write_text
from diffsynth_core.planning.memory.fit_options import memory_options
from diffsynth_core.planning.memory.fitted import HOST_SHARE, LEAST_HOST_BYTES, assumed_host_bytes
from diffsynth_core.planning.memory.fitting import TIGHT_BYTES, FitSearch, MemoryFit, engine_fits
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter, format_memory

PAGE = "gpu_memory.md"
"""Name of the page."""
GPUS = ("12GB", "16GB", "24GB", "48GB", "80GB")
"""Memory sizes of common rented GPUs."""
TWO = "80GB"
"""Memory of each of two GPUs."""
SEVERAL = ((2, "80GB"), (4, "80GB"), (8, "80GB"), (8, "24GB"))
"""Numbers and memory sizes of GPUs in one machine."""
SEVERAL_HEAD = "## Full training on several GPUs"


@dataclass(frozen=True)
class RecipeMemory:
    """What a recipe, or a stage of one, needs, and what makes it fit GPUs.

    Attributes:
        fits: of each of `GPUS`, and of two of `TWO`.
    """

    recipe: str
    stage: str | None
    fits: tuple[MemoryFit, ...]

    @property
    def row(self) -> str:
        """Its row in the table."""
        stage = f", stage `{self.stage}`" if self.stage else ""
        cells = " | ".join(map(_in_words, self.fits))
        return f"| `{self.recipe}`{stage} | {format_memory(self.fits[0].peak)} | {cells} |"

    @property
    def flag_lines(self) -> list[str]:
        """The flags for each size, below the name of the recipe; nothing for sizes that need none."""
        by_flags: dict[str, list[str]] = {}
        for size, fit in zip((*GPUS, f"2 x {TWO}"), self.fits, strict=True):
            if fit.changes and not fit.fits_unchanged:
                by_flags.setdefault(" ".join(change.flag for change in fit.changes), []).append(size)
        stage = f", stage `{self.stage}`" if self.stage else ""
        lines = [f"- {', '.join(sizes)}: `{flags}`" for flags, sizes in by_flags.items()]
        return [f"`{self.recipe}`{stage}", "", *lines, ""] if lines else []


def memory_page() -> str:
    """Return `docs/gpu_memory.md`: estimates of all recipes with their default parameters."""
    found = [each for recipe in page_recipes() for each in memory_of_recipe(recipe)]
    flags = [line for each in found for line in each.flag_lines]
    rows = [each.row for each in found]
    return "\n".join([*page_head(), *rows, "", *several_gpus(), "", *FLAGS_HEAD, "", *flags]).rstrip() + "\n"


def several_gpus() -> Iterator[str]:
    """Yield the section about full training on several GPUs."""
    sizes = [f"{number} x {size}" for number, size in SEVERAL]
    yield from (
        SEVERAL_HEAD,
        "",
        "The fastest engine with which each process fits without another change (`--num_processes 8 --accelerate_config",
        "fsdp2`), and the memory that it needs. `ddp` holds the whole model in each process; `fsdp2` divides weights,",
        "gradients and optimizer state, and `fsdp2offload` keeps its part of them in host memory. Where none fits, the",
        "smallest number of processes per clip with which it does (`--context_parallel 2`): that many times fewer clips are",
        "then computed at once.",
        "",
        f"| recipe | {' | '.join(sizes)} |",
        f"|---|{'---|' * len(sizes)}",
    )
    for recipe in page_recipes():
        yield from rows_of_several(recipe)


def rows_of_several(recipe: str) -> Iterator[str]:
    """Yield the rows of a recipe in that section: one of each stage that trains in full."""
    for plan in plan_of_recipe(recipe):
        if plan.training.full:
            stage = f", stage `{plan.parameters.only}`" if plan.parameters.only else ""
            yield f"| `{recipe}`{stage} | {' | '.join(_engine_in_words(plan, *gpus) for gpus in SEVERAL)} |"


def _engine_in_words(plan: RunPlan, number: int, size: str) -> str:
    several = replace(plan, machine=replace(plan.machine, world_size=number))
    run, limit = find_workload(several), memory_bytes(size)
    fits = engine_fits(several, memory_config(several, run.largest), limit, assumed_host_bytes(limit), run.encoded)
    fastest = next((fit for fit in fits if fit.fits), None)
    if fastest is None:
        return "does not fit"
    together = f" with {fastest.context_parallel} processes per clip" if fastest.context_parallel else ""
    return f"`{fastest.configuration}`{together}, {format_memory(fastest.peak)}"


def page_recipes() -> list[str]:
    """Return the recipes on the page: those that are not made for one size of GPU."""
    return [name for name in recipe_names() if "gpu_memory" not in load_recipe(name).parameters]


def page_head() -> list[str]:
    """Return the lines above the rows of the recipes."""
    sizes = [*GPUS, f"2 x {TWO}"]
    return [
        "# GPU memory of the recipes",
        "",
        "Generated from the plans of the recipes by `make docs`; a test fails when this page is out of date.",
        "",
        "What `diffsynth train --recipe NAME --gpu_memory 24GB --fit` changes, estimated in bf16 for the largest images or",
        "clips that the recipe allows, with batch size 1. Your own dataset and parameters change it: `--dry_run` prints the",
        "flags for them. Batch size, LoRA rank, image size and clip length are never changed. Kernel workspace and driver",
        f"overhead are not included: {format_memory(TIGHT_BYTES)} is left for them, and `tight` means that less is left.",
        "[memory.md](memory.md) compares such estimates with measurements, on tiny models and on a CPU; on GPUs they have",
        "not been measured.",
        "",
        "Changes are made in the order of what they cost, and none that is not needed: first those that cost only time, then",
        "those that round weights or optimizer state a little, then coarser ones. What waits in host memory has to fit there:",
        f"{HOST_SHARE} times the memory of the GPU, at least {format_memory(LEAST_HOST_BYTES)}, is assumed. Full training",
        "without changes keeps weights, gradients and the two states of AdamW in float32, 16 bytes per parameter.",
        "",
        f"Each of two GPUs (`--num_processes 2`) holds the whole model: two of {TWO} train about twice as fast as one, but fit",
        "less than it does, because buffers for gradients come on top, and updates in the backward pass need a single process.",
        "",
        f"| recipe | needs | {' | '.join(sizes)} |",
        f"|---|---|{'---|' * len(sizes)}",
    ]


FLAGS_HEAD = ("## Flags",)


def memory_of_recipe(recipe: str) -> Iterator[RecipeMemory]:
    """Yield each stage of a recipe, estimated without model files and without a dataset."""
    for plan in plan_of_recipe(recipe):
        two = replace(plan, machine=replace(plan.machine, world_size=2))
        yield RecipeMemory(recipe, plan.parameters.only, (*fits_on(plan, GPUS), *fits_on(two, [TWO])))


def plan_of_recipe(recipe: str) -> Iterator[RunPlan]:
    """Yield the plan of each stage of a recipe, without model files and without a dataset."""
    for resolved in resolve_stages({"recipe": recipe, "dry_run": True}, ()):
        with tempfile.TemporaryDirectory() as empty, chdir(empty):  # a default dataset would change the plan
            plan = make_plan(resolved, SilentReporter(), without_files=True)
        yield plan


def fits_on(plan: RunPlan, sizes: Sequence[str]) -> list[MemoryFit]:
    """Return what `fit` changes in a plan for GPUs of these sizes, in machines with the host memory that is assumed."""
    run = find_workload(plan)
    config = memory_config(plan, run.largest)
    options = [option for option in memory_options(plan, config) if option.cost != "scope"]
    search = FitSearch(plan, config, run.encoded, options)
    return [search.fit(limit, assumed_host_bytes(limit)) for limit in map(memory_bytes, sizes)]


def _in_words(fit: MemoryFit) -> str:
    if not fit.fits:
        return "does not fit"
    words = "unchanged" if fit.fits_unchanged else fit.tried[-1].words
    return f"{words} (tight)" if fit.is_tight else words


def write_documents(folder: Path) -> None:
    """Write the page into the documentation folder of a checkout."""
    write_text(folder / PAGE, memory_page())


if __name__ == "__main__":
    write_documents(Path(sys.argv[1]))
