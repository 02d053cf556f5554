"""Every engine trains in two processes what one process trains with accumulation."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs.engines import ENGINES, RECIPES, difference, flags_of, train_here, train_in_processes

CASES = [(family, task) for family in RECIPES for task in ("lora", "full")]
QUICK = CASES[:2]
SIMILAR = ("zero1", "zero2 offload", "zero3 offload")
"""Engines that are nearly others."""


@pytest.fixture(scope="module")
def prepared(recipe_models, photographs, tmp_path_factory) -> tuple[Path, Path, Callable[..., tuple[str, ...]]]:
    """Tiny models, an empty folder, and the flags of a case."""
    folder = tmp_path_factory.mktemp("engines")
    header, *rows = (photographs / "metadata.csv").read_text(encoding="utf-8").splitlines()
    for column in ("image", "video"):  # Wan takes images as clips of one frame
        lines = [header.replace("image", column), *rows[:3]]
        (folder / f"{column}.csv").write_text("\n".join(lines), encoding="utf-8")
    models = recipe_models(*(f"{RECIPES[family]}-{task}" for family, task in CASES))

    def flags(family: str, task: str) -> tuple[str, ...]:
        metadata = folder / ("video.csv" if family == "wan" else "image.csv")
        dataset = ("--dataset_base_path", str(photographs), "--dataset_metadata_path", str(metadata))
        return (*flags_of(family, task), *dataset)

    return models, folder, flags


@pytest.fixture(scope="module")
def alone(prepared) -> Callable[[str, str], Path]:
    """Train a case in one process, once; return its folder."""
    models, folder, flags = prepared

    def train(family: str, task: str) -> Path:
        output = folder / f"one-{family}-{task}"
        if not output.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(models))
                patch.chdir(folder)
                train_here({output: (*flags(family, task), "--gradient_accumulation_steps", "4")})
        return output

    return train


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.long if name in SIMILAR else ()) for name in ENGINES]
)
@pytest.mark.parametrize(
    "cases", [QUICK, pytest.param(CASES[2:], marks=pytest.mark.long)], ids=["qwen-image", "others"]
)
def test_an_engine_trains_what_one_process_does(prepared, alone, engine, cases):
    models, folder, flags = prepared
    outputs = {case: folder / f"{engine}-{'-'.join(case)}" for case in cases}
    runs = {output: (*flags(*case), "--gradient_accumulation_steps", "2") for case, output in outputs.items()}
    train_in_processes(engine, runs, folder, models)
    for case, output in outputs.items():
        losses, weights = difference(alone(*case), output)
        print(f"{engine}, {' '.join(case)}: losses off by {losses:.1e}, weights by {weights:.1e}")
        assert losses < 1e-5 and weights < 1e-5
