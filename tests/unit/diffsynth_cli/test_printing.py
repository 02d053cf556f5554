"""External text does not control the terminal, and printed JSON stays valid."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.printing import printable, printable_message, printable_text

STEERING = ["\x00", "\x07", "\x08", "\r", "\x1b[2J", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\udcff"]


@pytest.mark.parametrize("text", STEERING)
def test_what_steers_is_spelled_out(text):
    spelled = f"a\\u{ord(text[0]):04x}{text[1:]}b"
    for spell in (printable, printable_message, printable_text):
        assert spell(f"a{text}b") == spelled


def test_what_does_not_steer_stays():
    text = "«café» 日本語 👩‍🚀 שלום [red]x[/red] :warning: \\u001b"
    for spell in (printable, printable_message, printable_text):
        assert spell(text) == text


def test_no_name_feigns_a_line_of_its_own():
    assert printable("a\nb\tc") == "a\\u000ab\\u0009c"
    assert printable_message("in two\n  lines\nerror: feigned") == "in two\n  lines\\u000aerror: feigned"
    assert printable_text("a\nb\tc") == "a\nb\tc"


def test_json_stays_json():
    value = {"".join(STEERING): ["\\\x7f", "\u202e\udcff"]}
    for ascii_only in (True, False):
        text = printable_text(json.dumps(value, indent=2, ensure_ascii=ascii_only))
        assert json.loads(text) == value
        text.encode()


def test_messages_labels_and_the_log_are_spelled_out_and_no_markup_is_read(tmp_path):
    name = "\x1b[31m[red]x[/blue] :warning:.safetensors"
    stream = io.StringIO()
    reporter = ConsoleReporter(Console(file=stream, force_terminal=True, width=200, color_system=None, highlight=False))
    reporter.log_to(tmp_path / "log")
    reporter.info(f"info {name}")
    reporter.warn(f"warning {name}")
    with reporter.task(f"task {name}", 2, "files") as task:
        task.advance(2, field=name)
    reporter.close()
    shown, log = stream.getvalue(), (tmp_path / "log").read_text()
    for text, kinds in ((shown, ("info", "warning", "task")), (log, ("info", "warning"))):
        assert "\x1b[31m" not in text
        for kind in kinds:
            assert f"{kind} \\u001b[31m[red]x[/blue] :warning:.safetensors" in text


def test_a_terminal_that_lacks_characters_is_no_fault():
    code = "import sys; from diffsynth_cli.main import main; sys.exit(main(['recipe', 'show', '\\u2026']))"
    environment = {"PYTHONIOENCODING": "latin-1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "internal" not in done.stderr and "\\u2026" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"], ["dataset", "validate", "x"]])
def test_on_windows_one_message_names_wsl2(arguments):
    code = (
        "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None\n"
        "from diffsynth_cli.__main__ import run\n"
        "sys.exit(run())"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error == "error: diffsynth does not run natively on Windows" and "WSL2" in hint
