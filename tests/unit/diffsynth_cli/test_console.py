"""Progress in the terminal: several bars at once, bytes, and plain lines."""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import pyte
import pytest
from rich.console import Console

from diffsynth_cli.console import ConsoleReporter
from diffsynth_core.progress import format_duration


def reporter(terminal: bool) -> tuple[ConsoleReporter, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, height=20, color_system=None, highlight=False)
    return ConsoleReporter(console), stream


def screen(stream: io.StringIO) -> list[str]:
    """Return the content of the terminal."""
    terminal = pyte.Screen(100, 20)
    pyte.Stream(terminal).feed(stream.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in terminal.display if line.strip()]


def test_bars_of_tasks_at_the_same_time_and_warnings_above_them():
    """Each bar but the last disappears with its task, in any thread."""
    recorder, stream = reporter(terminal=True)

    def work(number: int) -> None:
        with recorder.task(f"file {number}", 2000, "bytes", done=500) as task:
            task.advance(1500)

    with recorder.task("all", 8000, "bytes") as whole:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        whole.advance(8000)
        recorder.warn("something broke")
    shown = screen(stream)
    assert shown[0] == "warning: something broke"
    assert [line.split()[0] for line in shown[1:]] == ["all"]
    assert " 8.0 kB/8.0 kB " in shown[1]
    with recorder.task("next", 10, "files") as task:
        task.advance(3)
    assert "  3/10 files " in screen(stream)[-1]


def test_a_line_of_the_plan_is_wrapped_between_words_in_a_terminal_and_whole_in_the_log(tmp_path):
    line = "  vae             Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors (1 file, 1.9 MB, 924.5 thousand parameters)"
    recorder, stream = reporter(terminal=True)
    recorder.log_to(tmp_path / "log")
    recorder.info(line)
    assert screen(stream) == [line[: line.index(" thousand")], " " * 18 + "thousand parameters)"]
    assert line in (tmp_path / "log").read_text()
    recorder.close()
    recorder, stream = reporter(terminal=False)
    recorder.info(line)
    assert stream.getvalue() == f"{line}\n"


@pytest.mark.parametrize(("unit", "line"), [("bytes", "x: 1.5 kB of 2.0 kB, "), ("files", "x: 1500 of 2000 files, ")])
def test_plain_lines_count_bytes_as_people_read_them(unit, line):
    recorder, stream = reporter(terminal=False)
    with recorder.task("x", 2000, unit, done=500) as task:
        task.advance(1000)
    assert stream.getvalue().startswith(line)


@pytest.mark.parametrize("width", [80, 99, 100, 200])
def test_the_remaining_time_is_never_cut(width):
    """The longest realistic line: a long run on a large GPU."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=20, color_system=None, highlight=False)
    with ConsoleReporter(console).task("Training", 100_000, "steps", done=12_345) as task:
        for _ in range(2):
            task.advance(loss="0.1234", memory="79.9 GB")
    terminal = pyte.Screen(width, 20)
    pyte.Stream(terminal).feed(stream.getvalue().replace("\n", "\r\n"))
    (line,) = [line.rstrip() for line in terminal.display if line.strip()]
    assert "12347/100000 steps" in line and "loss 0.1234  memory 79.9 GB" in line and "…" not in line
    assert re.search(r" ETA \d+ (s|min|h \d+ min)$", line)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "1 h 0 min"), (4082, "1 h 8 min"), (86399, "1 d 0 h"), (183600, "2 d 3 h")],
)  # fmt: skip
def test_durations_in_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text
