"""Mirrors that cannot be written, or hold something else."""

import json

import pytest

from tests.naming import names


@pytest.mark.parametrize(
    ("flags", "code", "problem", "hint"),
    [
        (("--mirror", "sfttp://host/run"), 2, names("mirror", "sfttp://"), names("`sftp://`")),
        (("--mirror", "webdav://host/run"), 1, names("mirror", "webdav://", "webdav4"), names("pip install webdav4")),
        (("--mirror", "s3://me:secret@bucket/run"), 2, names("mirror", "password"), names("logins")),
        (("--mirror", "out/copy", "--output_path", "out"), 2, names("out/copy", "output_path"), names("beside")),
        (("--mirror", "out", "--output_path", "out/run"), 2, names("mirror", "out/run"), names("beside")),
        (("--mirror", "copy", "--task", "sft:data_process"), 2, names("mirror", "sft:data_process"), names("--mirror")),
        (("--mirror", "/dev/null/copy"), 1, names("/dev/null/copy", "written"), names("--mirror")),
        (("--mirror", "s3://buck[et/run"), 2, names("mirror", "URL"), names("s3://bucket/run")),
    ],
)
def test_a_wrong_mirror_is_refused(refuse, flags, code, problem, hint):
    found, problems = refuse(*flags)
    assert found == code and (problem, hint) in problems


def test_the_password_is_not_shown(refuse, capsys):
    refuse("--mirror", "s3://me:secret@bucket/run")
    assert "secret" not in capsys.readouterr().err


def test_a_mirror_of_something_else_is_named_with_all_else(refuse, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    code, problems = refuse("--mirror", tmp_path / "photos", "--lora_rank", 0)
    assert code == 2 and [message for message, _ in problems][1:] == [names(tmp_path / "photos", "cat.png")]


def test_a_mirror_of_another_run(refuse, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/.mirror.json").write_text(json.dumps({"run": "other", "files": {}}))
    code, problems = refuse("--mirror", tmp_path / "copy")
    assert (code, problems) == (2, [(names(tmp_path / "copy", "another run"), names("output_path", "--resume auto"))])


def test_the_plan_states_what_is_copied(cli, photographs):
    flags = ("--recipe", "qwen-image-lora", "--dataset_base_path", photographs, "--device", "cpu", "--dry_run")
    planned = cli("train", *flags, "--mirror", "copy")
    text = " ".join(planned.out.split())
    assert planned.code == 0, planned.err
    assert "copied to `copy`: " in text and " with each checkpoint and " in text
