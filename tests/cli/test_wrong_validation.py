"""Held-out samples that are not there, or leave nothing to train on; and what the plan says of validation."""

import pytest

from tests.naming import names


@pytest.mark.parametrize(
    ("flags", "code", "problem", "hint"),
    [
        (("--validate_every", 5), 2, names("validate_every", "validation_split"), names("--validation_split")),
        (("--validation_split", "1.5"), 2, names("validation_split", "1.5"), names("0.05")),
        (("--validation_split", "0"), 2, names("validation_split", "0"), names("0.05")),
        (("--validation_split", "none.csv"), 1, names("validation_split", "none.csv", "exist"), names("share")),
        (("--validation_split", "0.9"), 1, names("validation_split", "0.9", "4 samples", "train"), names("smaller")),
        (("--keep_best", "--keep_checkpoints", 2), 2, names("keep_best", "validation_split"), names("--keep_best")),
        (
            ("--keep_best", "--validation_split", "0.25"),
            2,
            names("keep_best", "keep_checkpoints"),
            names("--keep_best"),
        ),
        (("--validation_split", "nan"), 2, names("validation_split", "nan"), names("0.05")),
        (
            ("--evaluate_ema", "--ema_decay", 0.9),
            2,
            names("evaluate_ema", "validation_split"),
            names("--validation_split"),
        ),
        (
            ("--evaluate_ema", "--validation_split", "0.25"),
            2,
            names("evaluate_ema", "ema_decay"),
            names("--ema_decay"),
        ),
    ],
)
def test_wrong_use_is_refused(refuse, flags, code, problem, hint):
    assert refuse(*flags) == (code, [(problem, hint)])


def test_a_path_is_not_for_two_stages(refuse, dataset):
    code, problems = refuse("--validation_split", dataset, "--task", "sft:data_process")
    assert (code, problems[0][0]) == (2, names("validation_split", dataset, "sft:data_process"))


def test_faults_of_the_held_out_samples_are_reported_with_the_others(refuse, dataset, tmp_path):
    (dataset / "held.csv").write_text("image,prompt\nmissing.png,a cat\n")
    code, problems = refuse("--validation_split", dataset / "held.csv", "--lora_rank", 0)
    assert code == 2 and [message for message, _ in problems][1:] == [names(dataset / "held.csv", "missing.png")]


def test_the_plan_states_what_validation_costs(cli, photographs):
    flags = (
        "--recipe",
        "qwen-image-lora",
        "--dataset_base_path",
        photographs,
        "--device",
        "cpu",
        "--dataset_repeat",
        2,
    )
    steps = ("--validation_split", 0.25, "--max_steps", 5, "--validate_every", 2, "--num_epochs", 9)
    planned = cli("train", *flags, *steps, "--dry_run")
    text = " ".join(planned.out.split())
    assert planned.code == 0, planned.err
    # Before the first step, after 2 and 4, and after 5: one sample at 4 timesteps each.
    assert "validated on 1 held-out sample at 4 timesteps each, before the first step, every 2 steps and with" in text
    assert "each checkpoint: 16 forward passes, beside about 5 forward and backward in training" in text
