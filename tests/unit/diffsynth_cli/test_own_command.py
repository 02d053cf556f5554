"""The command suggested after a rehearsal can be pasted, whether or not it is on PATH."""

import pytest

from diffsynth_cli.train_session import _own_command


@pytest.fixture
def program(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A program `diffsynth` in a folder with a space in its name, as the running program."""
    program = tmp_path / "a b" / "diffsynth"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    return program


def test_a_program_that_is_not_on_path_is_named_by_its_path(program, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _own_command() == f"'{program}'"


def test_a_program_on_path_is_named_by_its_name(program, monkeypatch):
    monkeypatch.setenv("PATH", str(program.parent))
    assert _own_command() == "diffsynth"


def test_another_program_of_that_name_does_not_count(program, monkeypatch, tmp_path):
    other = tmp_path / "other" / "diffsynth"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert _own_command() == f"'{program}'"
