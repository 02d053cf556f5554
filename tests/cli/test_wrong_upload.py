"""Uploads that cannot be, as far as their parameters say."""

import pytest

from tests.naming import names


@pytest.mark.parametrize(
    ("flags", "problem", "hint"),
    [
        (("--push_to_hub", "keyhole"), names("push_to_hub", "keyhole"), names("owner/name")),
        (("--push_to_hub", "https://hf.co/a/b"), names("push_to_hub", "https://hf.co/a/b"), names("owner/name")),
        (("--hub", "huggingface"), names("hub", "push_to_hub"), names("--hub")),
        (("--hub_public",), names("hub_public", "push_to_hub"), names("--hub_public")),
        (("--push_to_hub", "a/b", "--task", "sft:data_process"), names("push_to_hub", "sft:data_process"), names("--push_to_hub")),
    ],
)  # fmt: skip
def test_wrong_use_is_refused(refuse, flags, problem, hint):
    code, problems = refuse(*flags)
    assert code == 2 and (problem, hint) in problems


def test_the_plan_states_what_is_uploaded(cli, photographs):
    flags = ("--recipe", "qwen-image-lora", "--dataset_base_path", photographs, "--device", "cpu", "--dry_run")
    planned = cli("train", *flags, "--push_to_hub", "alice/keyhole", "--hub", "huggingface")
    text = " ".join(planned.out.split())
    assert planned.code == 0, planned.err
    assert "uploaded to `alice/keyhole` (huggingface), created private unless it exists: " in text
