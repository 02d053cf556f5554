"""A signal while writing: temporary files are removed, no file gets its final name, the exit code shows the signal."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from diffsynth_cli.errors import exit_code_of
from diffsynth_cli.stopping import handle_sigint
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.weight_writer import OutputFile, OutputTensor, write_outputs

def slowly():
    yield bytes(2)
    print("writing", flush=True)
    sys.stdin.readline()
    yield bytes(2)

outputs = [
    OutputFile(Path("out/deep") / name, (OutputTensor("x", "F32", (1,), source),))
    for name, source in (("a.safetensors", lambda: [bytes(4)]), ("b.safetensors", slowly))
]
try:
    with handle_sigint():
        write_outputs(outputs, [], SilentReporter())
except Exception as error:
    sys.exit(exit_code_of(error))
"""


def start(folder, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path, number):
    with start(tmp_path) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(list((tmp_path / "out" / "deep").iterdir())) == 2
        process.send_signal(number)
        _, reported = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert reported == f"Interrupted by {number.name}; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with start(tmp_path, preexec_fn=ignore) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGHUP)
        _, reported = process.communicate("\n", timeout=30)
    assert (process.returncode, reported) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out" / "deep").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_names_are_given_all_together(tmp_path, monkeypatch):
    """A signal between two renames comes too late: all files exist."""
    from diffsynth_cli.stopping import handle_sigint
    from diffsynth_core.progress import SilentReporter
    from diffsynth_core.weights import weight_writer as rewriting
    from diffsynth_core.weights.weight_writer import OutputFile, write_outputs

    real = rewriting._give_names

    def give(outputs, places):
        os.kill(os.getpid(), signal.SIGTERM)
        real(outputs, places)

    monkeypatch.setattr(rewriting, "_give_names", give)
    with handle_sigint():
        write_outputs(
            [OutputFile(tmp_path / name, ()) for name in ("a.safetensors", "b.safetensors")], [], SilentReporter()
        )
    assert len(list(tmp_path.iterdir())) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
