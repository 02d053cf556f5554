"""The examples in `--help` work as pasted, at any terminal width."""

import re
import subprocess
from functools import reduce
from pathlib import Path

import pytest
import typer

from diffsynth_cli.app import build_app
from diffsynth_cli.main import GROUPS

COMMANDS = [
    ["train"],
    ["generate"],
    ["run", "show"],
    ["dataset", "validate"],
    ["split-ckpt"],
    ["download"],
    ["merge-lora"],
    ["convert-lora"],
    ["recipe", "list"],
    ["recipe", "show"],
]


def shown_examples(text: str) -> list[str]:
    """Return the examples of a help text as displayed, including leading spaces."""
    section = text.partition("Examples:\n\n")[2].partition("\n\n\n")[0]
    paragraphs = re.split(r"\n\n", section)
    return [paragraph for paragraph in paragraphs if paragraph.lstrip().startswith("diffsynth ")]


def pasted_words(example: str, folder: Path) -> list[str]:
    """Return the arguments after `diffsynth` that a shell parses from a pasted example."""
    script = f'diffsynth() {{ printf "%s\\n" "$@"; }}\n{example}\n'
    ended = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout.splitlines()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_are_whole_as_pasted(cli, command, monkeypatch, tmp_path):
    """In a folder whose files would match the globs of the examples if they were not quoted."""
    for name in ("Qwen/Qwen-Image:transformer/a.safetensors", "Qwen/Qwen-Image:vae/a", "qwen_image/Qwen-Image/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    words = {}
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        outcome = cli(*command, "--help")
        examples = shown_examples(outcome.out)
        assert examples, outcome.out
        assert max(len(line) for example in examples for line in example.splitlines()) <= columns
        words[columns] = [pasted_words(example, tmp_path) for example in examples]
    assert words[60] == words[80] == words[120]
    for arguments in words[80]:
        assert arguments[: len(command)] == command
        assert parse_strictly(arguments) == []


def parse_strictly(arguments: list[str]) -> list[str]:
    """Parse a command line without running it; return words that no option consumed."""
    group = typer.main.get_command(build_app(arguments[0]))
    context = group.make_context("diffsynth", list(arguments))

    def step(context, _):
        rest = [*context._protected_args, *context.args]
        name, command, left = context.command.resolve_command(context, rest)
        return command.make_context(name, left, parent=context)

    depth = 2 if arguments[0] in GROUPS else 1
    return reduce(step, range(depth), context).args
