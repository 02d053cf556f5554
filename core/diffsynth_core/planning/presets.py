"""Recipes for GPUs of one size: a recipe, and the changes with which it fits. Run to write them: `python -m
diffsynth_core.planning.presets recipes`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffsynth_core.config.recipes import load_recipe
from diffsynth_core.files import write_text
from diffsynth_core.planning.documents import fits_on, plan_of_recipe

PRESETS: Mapping[str, tuple[str, ...]] = {
    "qwen-image-lora": ("12GB", "24GB"),
    "qwen-image-full": ("24GB", "80GB"),
    "flux.1-dev-lora": ("12GB", "24GB"),
    "flux.1-dev-full": ("24GB", "80GB"),
    "flux.2-klein-9b-lora": ("12GB",),
    "flux.2-klein-9b-full": ("24GB", "80GB"),
    "wan2.1-t2v-14b-lora": ("24GB",),
    "wan2.1-t2v-14b-full": ("24GB", "80GB"),
}
"""Recipe without stages -> sizes of GPUs that it does not fit unchanged."""
SCHEMA = "# yaml-language-server: $schema=../docs/recipe.schema.json\n"


def preset_name(recipe: str, size: str) -> str:
    """Return the name of a recipe for a size of GPU."""
    return f"{recipe}-{size.lower()}"


def preset_parameters(recipe: str, size: str) -> dict[str, Any]:
    """Return the parameters that a recipe has for a size of GPU, beside its own."""
    (plan,) = plan_of_recipe(recipe)
    (fit,) = fits_on(plan, [size])
    changed = {change.parameter: change.value for change in fit.changes}
    if changed.get("trained_dtype") == "bf16":
        changed["mixed_precision"] = "bf16"  # the default on a GPU; a rehearsal on a CPU needs it
    return {"gpu_memory": size, **changed}


def preset_text(recipe: str, size: str) -> str:
    """Return the file of a recipe for a size of GPU."""
    content = {
        "extends": recipe,
        "description": f"{load_recipe(recipe).description}, on a GPU of {size.removesuffix('GB')} GB",
        "parameters": preset_parameters(recipe, size),
    }
    return SCHEMA + yaml.safe_dump(content, sort_keys=False, width=120)


def write_presets(folder: Path) -> None:
    """Write all of them into the recipes of a checkout."""
    for recipe, sizes in PRESETS.items():
        for size in sizes:
            write_text(folder / f"{preset_name(recipe, size)}.yaml", preset_text(recipe, size))


if __name__ == "__main__":
    write_presets(Path(sys.argv[1]))
