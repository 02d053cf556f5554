"""Parameters that may change on resume: each declaration against a record of the previous run."""

from pathlib import Path
from typing import Any

import pytest

from diffsynth_core.checkpoints.run_folder import RunRecord
from diffsynth_core.config.parameters import DEFAULTS, SETTINGS, Parameters, as_plain
from diffsynth_core.data.batches import BatchPlan, StepPlan
from diffsynth_core.errors import Problem, collect_problems
from diffsynth_core.planning.output.folder import check_output
from diffsynth_core.progress import SilentReporter

OTHER_VALUES: dict[str, Any] = {
    "int": 512, "float": 0.25, "path": "other", "str": "other", "comma list": "other", "memory": "12GB",
    "json list": '["other"]', "number pair": "0.9,0.99",
    "arguments": "fused=true", "quant options": "a:b:nf4", "blocks": 3, "duration": "90m", "split": "0.25",
}  # fmt: skip
NUMBERS = ("learning_rate", "seed", "lora_rank", "zero_cond_t", "lr_scheduler", "height", "task", "extra_inputs")
FREE = (
    "gpu_memory", "accelerate_config", "num_processes", "gradient_accumulation_steps", "dataset_num_workers", "device",
    "use_gradient_checkpointing", "remove_prefix_in_ckpt", "align_to_opensource_format", "save_steps", "lora_format",
    "tokenizer_path", "tokenizer_1_path", "tokenizer_2_path", "max_steps", "num_epochs", "output_path", "cache_path",
)  # fmt: skip


def other_value(name: str) -> Any:
    """Return a valid value of a parameter other than its default."""
    setting = SETTINGS[name]
    if setting.type_name == "bool":
        return not setting.default
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    return OTHER_VALUES[setting.type_name]


def problems_of_resuming(
    folder: Path, before: dict[str, Any], diverged_step: int | None = None, **now: Any
) -> list[Problem]:
    """Return the problems of resuming a run recorded with `before`, with the parameters `now`."""
    folder.mkdir(exist_ok=True)
    RunRecord(before, "qwen-image", 0, "fingerprint", {}, "no", 1, diverged_step=diverged_step).save(folder)
    parameters = Parameters.model_validate({"resume": "auto", **now, "output_path": folder})
    with collect_problems() as problems:
        check_output(parameters, "fingerprint", None, "no", None, SilentReporter())
    return problems


@pytest.mark.parametrize("name", SETTINGS)
def test_what_changes_numbers_must_stay_and_the_rest_is_free(tmp_path, name):
    if name in ("resume", "output_path"):
        return
    problems = problems_of_resuming(tmp_path / "run", dict(DEFAULTS), **{name: other_value(name)})
    assert bool(problems) == SETTINGS[name].fixed_on_resume
    assert all(problem.message.startswith(f"`{name}` was ") for problem in problems)


def test_what_users_change_on_resume_is_declared_free():
    assert all(SETTINGS[name].fixed_on_resume for name in NUMBERS)
    assert not any(SETTINGS[name].fixed_on_resume for name in FREE)


def test_only_what_changes_numbers_is_compared_by_what_comes_of_it():
    assert {setting.changes for setting in SETTINGS.values() if setting.compared != "value"} == {"numbers"}


@pytest.mark.parametrize(
    "name", ["learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "weight_decay", "adam_betas"]
)
def test_after_a_loss_that_was_not_finite_the_course_of_the_optimizer_is_free(tmp_path, name):
    now = {name: other_value(name)}
    (problem,) = problems_of_resuming(tmp_path / "run", dict(DEFAULTS), **now)
    assert problem.message.startswith(f"`{name}` was ")
    assert problems_of_resuming(tmp_path / "run", dict(DEFAULTS), diverged_step=3, **now) == []
    (problem,) = problems_of_resuming(tmp_path / "run", dict(DEFAULTS), diverged_step=3, seed=5)
    assert problem.message.startswith("`seed` was ")


def test_a_parameter_that_an_older_run_did_not_know_had_its_default(tmp_path):
    older = {name: value for name, value in DEFAULTS.items() if name not in ("zero_cond_t", "lr_scheduler")}
    assert problems_of_resuming(tmp_path / "run", older) == []
    (problem,) = problems_of_resuming(tmp_path / "run", older, lr_scheduler="cosine")
    assert problem.message.startswith("`lr_scheduler` was `constant` in the run in")


def test_a_parameter_that_is_no_more_keeps_no_run_from_going_on(tmp_path):
    assert problems_of_resuming(tmp_path / "run", {**DEFAULTS, "given_up": 3}) == []


def test_defaults_are_plain():
    assert as_plain(Parameters.model_validate(DEFAULTS)) == DEFAULTS


@pytest.mark.parametrize(
    ("accumulated", "processes", "same"), [(4, 1, True), (2, 2, True), (1, 4, True), (2, 4, False)]
)
def test_processes_times_accumulation_counts_and_not_the_factors(tmp_path, accumulated, processes, same):
    (tmp_path / "run").mkdir()
    before = {**DEFAULTS, "gradient_accumulation_steps": 2, "num_processes": 2}
    RunRecord(before, "qwen-image", 0, "fingerprint", {}, "no", micro_batches_per_step=4).save(tmp_path / "run")
    given = {"gradient_accumulation_steps": accumulated, "num_processes": processes, "resume": "auto"}
    parameters = Parameters.model_validate({**given, "output_path": tmp_path / "run"})
    steps = StepPlan(BatchPlan([(1, 64, 64)] * 8, 1, 1, 0), accumulated * processes, 1, None)
    with collect_problems() as problems:
        check_output(parameters, "fingerprint", steps, "no", None, SilentReporter())
    assert [problem.hint for problem in problems] == (
        [] if same else ["resume with `--gradient_accumulation_steps` x processes = 4"]
    )
