"""Recipes for GPUs of one size: their parameters are those with which `fit` makes the recipe fit."""

from pathlib import Path

import pytest

from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.config.recipes import load_recipe, recipe_folder, recipe_names
from diffsynth_core.planning.documents import PAGE, fits_on, plan_of_recipe
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.presets import PRESETS, preset_name, preset_text

ALL = [(recipe, size) for recipe, sizes in PRESETS.items() for size in sizes]
QUICK = (("flux.1-dev-lora", "24GB"), ("qwen-image-full", "24GB"))
ROOT = Path(__file__).parents[3]
FULL_24GB, LORA_12GB = ("qwen-image-full", "flux.1-dev-full"), ("qwen-image-lora", "flux.1-dev-lora")


def test_there_is_one_for_each():
    named = {preset_name(*preset) for preset in ALL}
    assert named == {name for name in recipe_names() if "gpu_memory" in load_recipe(name).parameters}
    for recipe, size in ALL:
        assert load_recipe(preset_name(recipe, size)).parameters["gpu_memory"] == size
        assert load_recipe(preset_name(recipe, size)).family == load_recipe(recipe).family


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "size"), [preset if preset in QUICK else pytest.param(*preset, marks=pytest.mark.long) for preset in ALL]
)
def test_it_is_what_fit_says_and_fits(recipe, size):
    name = preset_name(recipe, size)
    assert (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8") == preset_text(recipe, size)
    (base,), (plan,) = plan_of_recipe(recipe), plan_of_recipe(name)
    (fit,) = fits_on(base, [size])
    assert not fit.fits_unchanged
    peak = device_memory(plan, memory_config(plan, find_workload(plan).largest)).peak
    assert peak == fit.tried[-1].peak <= memory_bytes(size)
    never = ("batch_size", "lora_rank", "max_pixels", "height", "width", "num_frames")
    assert all(getattr(plan.parameters, each) == getattr(base.parameters, each) for each in never)


def test_every_recipe_fits_the_gpus_that_people_rent():
    """By the page, which another test compares with the recipes."""
    page, _, _ = (ROOT / "docs" / PAGE).read_text(encoding="utf-8").partition("\n## ")
    head, *rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    cells = {row[0].replace("`", ""): dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    assert len({name.partition(",")[0] for name in cells}) == 40
    for name, by_size in cells.items():
        assert "does not fit" not in by_size["80GB"], name
        if name.partition(",")[0].endswith("-lora"):
            assert "does not fit" not in by_size["24GB"], name
    for recipe in FULL_24GB:
        assert "does not fit" not in cells[recipe]["24GB"], recipe
    for recipe in LORA_12GB:
        assert "does not fit" not in cells[recipe]["12GB"], recipe


def test_every_full_training_fits_the_gpus_of_one_machine():
    page = (ROOT / "docs" / PAGE).read_text(encoding="utf-8").partition("## Full training on several GPUs")[2]
    _, *rows = [line.strip("| ").split(" | ") for line in page.partition("\n## ")[0].splitlines() if line[:2] == "| "]
    assert len(rows) == 22
    assert not [name for name, *by_gpus in rows for fit in by_gpus[:3] if fit == "does not fit"], "of 80 GB"
