"""Completion as a user sees it: bash, zsh and fish on a pseudo-terminal, with the script of `--show-completion`."""

import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

from diffsynth_cli.__main__ import run
from diffsynth_cli.main import main
from diffsynth_core.config.recipes import recipe_names

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SET_UP = {
    "bash": "PS1='$ '; bind 'set bell-style none'; bind 'set show-all-if-ambiguous on'; bind 'set page-completions off'; \n",
    "zsh": "PS1='$ '; autoload -Uz compinit; compinit -u -D\n",
    "fish": "function fish_prompt; echo '$ '; end\n",
}
COLUMNS, LINES = 160, 60
SECONDS = 60


class Shell:
    """An interactive shell and its screen."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self._parent, child = pty.openpty()
        termios.tcsetwinsize(child, (LINES, COLUMNS))
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self._screen)
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=child, stdout=child, stderr=child, env=environment, cwd=folder
        )
        os.close(child)

    def send(self, keys: str) -> None:
        os.write(self._parent, keys.encode())

    def wait_for(self, *texts: str) -> str:
        """Return the screen as soon as it contains all of `texts`."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if select.select([self._parent], [], [], 0.05)[0]:
                self._stream.feed(os.read(self._parent, 65536))
            shown = "\n".join(line.rstrip() for line in self._screen.display).strip()
            if all(text in shown for text in texts):
                return shown
        raise AssertionError(f"{texts} never came:\n{shown}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._parent)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    """A shell with our completion, in which `diffsynth` is that of this checkout."""
    name = request.param
    if not shutil.which(name) and not os.environ.get("DIFFSYNTH_REQUIRE_SHELLS"):
        pytest.skip(f"{name} is not installed")
    command = tmp_path / "bin" / "diffsynth"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m diffsynth_cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": str(COLUMNS),
        "LINES": str(LINES),
    }  # fmt: skip
    shell = Shell(SHELLS[name], environment, tmp_path)
    shell.send(SET_UP[name])
    shell.send("diffsynth --show-completion > completion; source completion; echo re''ady\n")
    shell.wait_for("\nready")
    yield shell
    shell.close()


def test_recipes_options_and_values_are_offered(shell: Shell):
    shell.send("diffsynth train --recipe flux.2-klein-base-\t")
    names = [name for name in recipe_names() if name.startswith("flux.2-klein-base-")]
    shell.wait_for(*(name.removeprefix("flux.2-klein-base-") for name in names))  # fish shortens what is typed already
    shell.send("4b-l\t")
    shell.wait_for("--recipe flux.2-klein-base-4b-lora")
    shell.send("--lora_fo\t")
    shell.wait_for("flux.2-klein-base-4b-lora --lora_format")
    shell.send("di\t")  # diffsynth and diffusers begin alike
    shell.wait_for("--lora_format diff")
    shell.send("u\t")
    shell.wait_for("--lora_format diffusers")


def test_a_command_and_a_file_are_completed(shell: Shell, tmp_path: Path):
    (tmp_path / "my_images").mkdir()
    shell.send("diffsynth dow\t")
    shell.wait_for("diffsynth download")
    shell.send("\x15")
    shell.send("diffsynth dataset validate my_i\t")
    shell.wait_for("diffsynth dataset validate my_images")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("diffsynth recipe sh", ["show"]),
        ("diffsynth run sh", ["show"]),
        ("diffsynth recipe show wan2.2-ti2v", ["wan2.2-ti2v-5b-full", "wan2.2-ti2v-5b-lora"]),
        ("diffsynth download flux.1-krea", ["flux.1-krea-dev-full", "flux.1-krea-dev-lora"]),
        ("diffsynth dataset validate --recipe qwen-image-2", ["qwen-image-2512-full", "qwen-image-2512-lora"]),
        ("diffsynth train --accelerate_config zero2", ["zero2", "zero2offload"]),
        ("diffsynth train --mixed-precision b", ["bf16"]),
        ("diffsynth train --lora-fo", ["--lora_format"]),
        ("diffsynth convert-lora x.safetensors --to k", ["kohya"]),
        ("diffsynth train --output_path mod", []),
    ],
)
def test_what_bash_is_told(monkeypatch, capsys, tmp_path, line, expected):
    """As the script of bash asks, in this process: from the table, and by typer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable, value in request_of_bash(line).items():
        monkeypatch.setenv(variable, value)
    assert run() == 0
    assert capsys.readouterr().out.split() == expected
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == expected


def request_of_bash(line: str) -> dict[str, str]:
    return {"_DIFFSYNTH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}


def test_nothing_heavy_is_imported_for_a_completion(tmp_path):
    def imported(line: str) -> set[str]:
        command = [sys.executable, "-X", "importtime", "-m", "diffsynth_cli"]
        environment = os.environ | request_of_bash(line) | {"XDG_CACHE_HOME": str(tmp_path)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return {text.rpartition("|")[2].strip() for text in ended.stderr.splitlines()}

    first = imported("diffsynth train --recipe qwen")
    assert "typer" in first  # for the table
    assert first & {"torch", "numpy", "PIL", "transformers"} == set()
    for line in ("diffsynth train --recipe qwen", "diffsynth dataset validate --dep", "diffsynth download fl"):
        assert imported(line) & {"typer", "rich", "pydantic", "yaml", "diffsynth_core.errors"} == set(), line
