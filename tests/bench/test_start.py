"""Start-up time of commands."""

import statistics
import sys

import pytest

from tests.bench.conftest import timed_process

ROUNDS = 5
IMPORTS = (
    "import typer, rich.progress, pydantic, torch, accelerate, peft, safetensors.torch, PIL.Image, numpy; "
    "from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel; "
    "from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage; "
    "from transformers import Qwen2_5_VLForConditionalGeneration"
)
"""Imports of planning and of a training step of Qwen-Image, which checks the shapes of three components on their
classes.
"""


def test_help_takes_less_than_4_times_the_import_of_typer_and_rich(bench):
    helps, imports = [], []
    for _ in range(bench.rounds(2 * ROUNDS)):
        helps.append(timed_process([sys.executable, "-m", "diffsynth_cli", "--help"])[0])
        imports.append(timed_process([sys.executable, "-c", "import typer, rich"])[0])
    ratio = statistics.median(helps) / statistics.median(imports)
    bench.at_most("`diffsynth --help` / `import typer, rich`", ratio, 4)


def test_a_completion_takes_less_than_5_times_the_start_of_python(bench, tmp_path, monkeypatch):
    for variable, value in {
        "XDG_CACHE_HOME": str(tmp_path),
        "_DIFFSYNTH_COMPLETE": "complete_bash",
        "COMP_WORDS": "diffsynth train --recipe flux",
        "COMP_CWORD": "3",
    }.items():
        monkeypatch.setenv(variable, value)
    command = [sys.executable, "-m", "diffsynth_cli"]
    timed_process(command)  # writes the table
    answers, starts = [], []
    for _ in range(bench.rounds(4 * ROUNDS)):
        answers.append(timed_process(command)[0])
        starts.append(timed_process([sys.executable, "-c", "pass"])[0])
    ratio = statistics.median(answers) / statistics.median(starts)
    bench.at_most("a completion / `python -c pass`", ratio, 5)


@pytest.mark.long
def test_a_second_run_starts_within_1_5_times_its_imports(start_to_first_step, bench):
    runs, imports = [], []
    for _ in range(bench.rounds(ROUNDS)):
        runs.append(start_to_first_step()[0])
        imports.append(timed_process([sys.executable, "-c", IMPORTS])[0])
    ratio = statistics.median(runs) / statistics.median(imports)
    bench.at_most("a whole run of one cached step / its imports", ratio, 1.5)


@pytest.mark.long
def test_a_huge_repeat_costs_neither_time_nor_memory(start_to_first_step, bench):
    once, often = [], []
    for _ in range(bench.rounds(ROUNDS)):
        once.append(start_to_first_step("--dataset_repeat", "1"))
        often.append(start_to_first_step("--dataset_repeat", str(10**12)))
    seconds = statistics.median(run[0] for run in often) / statistics.median(run[0] for run in once)
    memory = statistics.median(run[1] for run in often) / statistics.median(run[1] for run in once)
    bench.at_most("dataset_repeat 10^12 / 1: time", seconds, 1.2)
    bench.at_most("dataset_repeat 10^12 / 1: peak memory", memory, 1.05)
