"""Usage errors detected by Typer: the option, what it accepts, and the help of the command."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--resume"], ["--resume", "`--resume auto`"]),
        (["train", "--mixed-precision"], ["--mixed_precision", "no|bf16|fp16"]),
        (["train", "--lora_rank"], ["--lora_rank", "`diffsynth train --help`"]),
        (["recipe", "shw"], ["shw", "`diffsynth recipe --help`"]),
        (["dataset", "validate", "--depth", "foo", "x"], ["--depth", "foo", "`diffsynth dataset validate --help`"]),
        (["dataset", "validate", "--fix"], ["--fix", "`diffsynth dataset validate --help`"]),
        (["dataset", "validate", "--min_side", "a", "."], ["`--min_side`", "an integer", "`a`"]),
        (["dataset", "validate", "--workers", "-1", "."], ["`--workers`", "at least 0", "`-1`"]),
        (["merge-lora", "--lora", "x"], ["--output_path", "`diffsynth merge-lora --help`"]),
        (["merge-lora", "--lora", "x", "--output_path", "y", "--rank", "x"], ["`--rank`", "an integer", "`x`"]),
        (["trian"], ["trian", "train", "`diffsynth --help`"]),
    ],
    ids=lambda value: " ".join(value[:4]),
)
def test_wrong_use_names_the_option_and_the_right_help(cli, says, arguments, named):
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Value error" not in outcome.err
    for text in named:
        assert text in outcome.err
    says(outcome)
