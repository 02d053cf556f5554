"""`--fit`: a run is changed until it fits, says how in flags, and leaves alone what it must not touch."""

import re
import shlex
from pathlib import Path

import pytest

from tests.naming import names

ENTRY = "black-forest-labs/FLUX.1-dev:flux1-dev.safetensors"


@pytest.fixture
def plan(cli, tmp_path, monkeypatch):
    """Run a dry run of FLUX.1 without models and dataset, where a run would download models."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")

    def run(*arguments: object, recipe: str = "flux.1-dev-lora"):
        outcome = cli("train", "--recipe", recipe, "--dry_run", *arguments)
        assert list(Path().iterdir()) == []
        return outcome

    return run


def set_by_fit(outcome) -> str:
    """Return the flags that a plan says `fit` set."""
    (line,) = re.findall(r"^Fit +`--fit` set (.+)$", outcome.out, re.MULTILINE)
    return line


def test_a_run_is_changed_until_it_fits_and_says_how(plan, says):
    outcome = plan("--gpu_memory", "24GB", "--fit")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == names("Fits in 24.0 GiB", "left for overhead")
    says(outcome, r"[\d.]+ [MGT]B free(: not enough)?")
    by_hand = plan("--gpu_memory", "24GB", *shlex.split(set_by_fit(outcome)))
    assert by_hand.code == 0
    fitted = [line for line in outcome.out.splitlines() if not line.startswith("Fit ")]
    assert by_hand.out.splitlines() == fitted


def test_a_run_that_fits_is_not_changed(plan):
    fitting, usual = plan("--gpu_memory", "80GB", "--fit"), plan("--gpu_memory", "80GB")
    assert fitting.code == 0 and fitting.out == usual.out


def test_without_a_gpu_its_memory_must_be_given(plan, says):
    outcome = plan("--fit", "--lora_rnk", 3)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err == names("fit", "no GPU") and outcome.err == names("hint:", "--gpu_memory")
    assert outcome.err == names("lora_rnk", "is not a parameter")
    says(outcome)
    outcome = plan("--fit", "--device", "cpu")
    assert outcome.err == names("fit", "device", "cpu")


def test_what_is_missing_is_told_where_nothing_fits(plan, says):
    outcome = plan("--gpu_memory", "2GB", "--fit")
    assert outcome.code == 3 and outcome.out == ""
    assert outcome.err == names("fit", "more than", "2.0 GiB") and outcome.err == names("hint:", "GPU with more memory")
    says(outcome)


CHOSEN = [
    ("--quant_options", f"{ENTRY}:int8"),
    ("--optimizer", "lion"),
    ("--no-use_gradient_checkpointing",),
    ("--blocks_to_swap", "30"),
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: chosen[0])
def test_what_a_flag_sets_stays(plan, chosen):
    outcome = plan("--gpu_memory", "16GB", "--fit", *chosen)
    name = chosen[0].removeprefix("--").removeprefix("no-")
    if chosen[0].startswith("--no-"):  # too much to fit is kept: nothing else is recomputed instead
        assert outcome.code == 3 and "recomputed" not in outcome.err and "block inputs" not in outcome.err
    else:
        assert outcome.code == 0 and f"--{name} " not in set_by_fit(outcome)


def test_two_cannot_choose_the_number_of_blocks(plan, says):
    outcome = plan("--gpu_memory", "24GB", "--fit", "--blocks_to_swap", "auto")
    assert outcome.code == 2 and outcome.err == names("fit", "blocks_to_swap", "auto")
    says(outcome)


def test_a_rehearsal_has_nothing_to_fit(cli, says):
    outcome = cli("train", "--recipe", "flux.1-dev-lora", "--rehearse", "--fit")
    assert outcome.code == 2
    assert outcome.err == names("fit", "no effect", "rehearsal")
    says(outcome)
