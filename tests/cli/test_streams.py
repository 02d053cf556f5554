"""stdout and stderr whose reader is gone or whose disk is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffsynth_cli.streams import MessageStream, ReaderGone, guarded_streams
from diffsynth_core.errors import DiffSynthError

SHOW = ("recipe", "show", "qwen-image-lora")


def start(*words, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "diffsynth_cli", *words], text=True, **streams)


@pytest.mark.parametrize(
    "words",
    [
        SHOW,
        ("--help",),
        ("dataset", "validate", "{data}", "--format", "json", "--depth", "metadata"),
        ("dataset", "validate", "{data}", "--depth", "metadata"),
    ],
    ids=" ".join,
)
def test_data_that_cannot_be_written_is_a_failure(photographs, words):
    with Path("/dev/full").open("w") as full:
        process = start(*(word.format(data=photographs) for word in words), stdout=full, stderr=subprocess.PIPE)
        _, reported = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = [line for line in reported.splitlines() if line.startswith("error")]
    assert lines == ["error: cannot write to stdout: No space left on device"]
    assert "internal" not in reported and "Traceback" not in reported and "Exception ignored" not in reported


def test_what_a_full_disk_makes_of_data(says):
    with Path("/dev/full").open("w") as full:
        process = start(*SHOW, stdout=full, stderr=subprocess.PIPE)
        says(process.communicate(timeout=60)[1])


@pytest.mark.parametrize("words", [SHOW, ("dataset", "validate", "{data}", "--depth", "metadata")], ids=" ".join)
def test_a_reader_that_has_enough_is_nothing_to_speak_of(photographs, words):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*(word.format(data=photographs) for word in words), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, reported = process.communicate(timeout=60)
    assert process.returncode == 141  # as a shell tells of a program that SIGPIPE ended
    assert "error" not in reported and "Broken" not in reported


def test_messages_that_cannot_be_written_change_no_exit_code():
    with Path("/dev/full").open("w") as full:
        process = start("recipe", "show", "nothing", stdout=subprocess.PIPE, stderr=full)
        assert process.communicate(timeout=60) == ("", None)
    assert process.returncode == start("recipe", "show", "nothing", stderr=subprocess.DEVNULL).wait(timeout=60)


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_not_taken_by_the_files_that_are_written(tmp_path, closed):
    """A free descriptor is assigned to the next file, which messages would then corrupt."""
    script = "import os, sys; from diffsynth_cli.__main__ import run; run(); os.write(2, b'x'); sys.exit(os.open('f', os.O_CREAT))"
    command = ["sh", "-c", f'"$0" -c "$1" --version {closed}', sys.executable, script]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode > 2


class Refusing:
    """A stream that fails on demand."""

    def __init__(self, error: Exception) -> None:
        self.error, self.tried = error, 0

    def write(self, text: str) -> None:
        self.tried += 1
        raise self.error

    flush = write

    def fileno(self) -> int:
        raise OSError("none")


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (OSError(5, "Input/output error"), 1),
        (BrokenPipeError(32, "Broken pipe"), 1),
        (BlockingIOError(11, "again"), 2),
        (RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>"), 2),
    ],
    ids=repr,
)
def test_messages_are_given_up_for_good_where_that_makes_sense(error, tried):
    stream = Refusing(error)
    messages = MessageStream(stream)
    assert [messages.write("ab"), messages.write("c")] == [2, 1]
    assert stream.tried == tried


@pytest.mark.parametrize(
    ("error", "raised"), [(BrokenPipeError(32, "Broken pipe"), ReaderGone), (OSError(28, "full"), DiffSynthError)]
)
def test_data_fails_as_an_error_of_ours(monkeypatch, error, raised):
    monkeypatch.setattr(sys, "stdout", Refusing(error))
    with guarded_streams():
        for _ in range(2):
            with pytest.raises(raised):
                print("x")
    assert isinstance(sys.stdout, Refusing)
