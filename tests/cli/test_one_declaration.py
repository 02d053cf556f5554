"""A parameter is declared in one place: help, schema, pages, resuming and rehearsals know it without another change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECLARATION = """\
    grain: Integer = _setting(
        7,
        "size",
        "int",
        "Grain of the film",
        changes="numbers",
        unit="grains",
        documented=False,
        ge=1,
        reads_data=True,
        rehearsal_limit=5,
    )

"""
QUESTIONS = """\
import json
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import RunRecord
from diffsynth_core.config.documents import recipe_schema, reference_page
from diffsynth_core.config.parameters import DEFAULTS, Parameters
from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import collect_problems
from diffsynth_core.planning.output.folder import check_output
from diffsynth_core.progress import SilentReporter
from diffsynth_core.rehearsal.preparation import prepare

before = {name: value for name, value in DEFAULTS.items() if name != "grain"}
RunRecord(parameters=before, family="qwen-image", seed=0, dataset_fingerprint="", components={}, mixed_precision="no",
          micro_batches_per_step=1, id="x", step=1, total_steps=2).save(Path("run"))
found = {}
for grain in (7, 8):
    with collect_problems() as problems:
        now = Parameters(resume="auto", output_path="run", grain=grain)
        check_output(now, "", None, "no", (), SilentReporter())
    found[grain] = [problem.message for problem in problems if "`grain`" in problem.message]
rehearsed, _ = prepare(resolve({"recipe": "qwen-image-lora", "rehearse": True}), SilentReporter())
print(json.dumps({
    "schema": recipe_schema()["properties"]["parameters"]["properties"]["grain"],
    "page": reference_page(),
    "same": found[7],
    "other": found[8],
    "rehearsed": rehearsed.parameters.grain,
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages, with one more declaration."""
    copy = tmp_path_factory.mktemp("declared")
    for name in ("core/diffsynth_core", "diffsynth_cli", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "core/diffsynth_core/config/parameters.py"
    head, mark, tail = path.read_text().partition("    # model\n")
    assert mark
    path.write_text(f"{head}{DECLARATION}{mark}{tail}")
    return copy


def run(package: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{package / 'core'}", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=package, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", [("train",), ("dataset", "validate")])
def test_help_lists_it(package, command):
    text = " ".join(run(package, "-m", "diffsynth_cli", *command, "--help").split())
    assert "--grain INTEGER Grain of the film" in text


@pytest.mark.slow
def test_files_pages_resuming_and_rehearsals_know_it(package):
    (package / "run").mkdir()
    answers = json.loads(run(package, "-c", QUESTIONS).splitlines()[-1])
    assert (answers["schema"]["default"], answers["schema"]["minimum"]) == (7, 1)
    assert "`grain`" in answers["page"] and "Grain of the film" in answers["page"]
    assert answers["same"] == [] and len(answers["other"]) == 1, "an older run counts as one with the default"
    assert answers["rehearsed"] == 5
