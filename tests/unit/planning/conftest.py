"""Plans without files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPlan]:
    """The plan of a recipe where no model files are."""
    monkeypatch.chdir(tmp_path)

    def make(recipe: str = "flux.1-dev-lora", **parameters: object) -> RunPlan:
        given = {"recipe": recipe, "output_path": "out", "cache_path": "cache", **parameters}
        return make_plan(resolve(given), SilentReporter(), base=tmp_path / "models", without_files=True)

    return make
