"""Completion from the table: equal to typer's in all cases, and never from an outdated table."""

import json
import os
from collections.abc import Iterator

import pytest
import typer

from diffsynth_cli.app import COMMANDS, build_app
from diffsynth_cli.completion import complete
from diffsynth_cli.completion_table import commands, remember_commands, sources
from diffsynth_cli.remembered_commands import remembered_commands, table_path
from diffsynth_core.config.recipes import recipe_folder

SHELLS = [("bash", {}), ("zsh", {}), ("powershell", {})] + [
    ("fish", {"_TYPER_COMPLETE_FISH_ACTION": action}) for action in ("get-args", "is-args")
]
TABLE = commands()
LEAVES = {
    (name, *([inner] if inner else [])): entry["commands"][inner] if inner else entry
    for name, entry in TABLE["commands"].items()
    for inner in (entry["commands"] or [""])
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def remembered(monkeypatch) -> None:
    """As if the commands had been read from their table."""
    monkeypatch.setattr("diffsynth_cli.completion.remembered_commands", lambda: TABLE)


@pytest.fixture(scope="module")
def typers() -> dict[str | None, object]:
    """Command -> all commands as typer has them."""
    return {name: typer.main.get_command(build_app(name)) for name in (None, *COMMANDS)}


def ask(monkeypatch, shell: str, words: list[str], incomplete: str) -> None:
    """Set the variables that the shell's script sets; words are split at spaces, as there."""
    line = " ".join(["diffsynth", *words, incomplete])
    monkeypatch.setenv("_DIFFSYNTH_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS" if shell == "bash" else "_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) + 1))
    monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", incomplete)
    monkeypatch.setenv("COLUMNS", "10000")  # typer breaks lines of help, which fish and PowerShell take for answers


def both(monkeypatch, capsys, typers, shell: str, words: list[str], incomplete: str) -> tuple[object, object]:
    """Return the answers from the table and by typer: text and exit code."""
    ask(monkeypatch, shell, words, incomplete)
    code = complete()
    ours = capsys.readouterr().out, code
    with pytest.raises(SystemExit) as ended:
        typers[words[0] if words else None].main([], prog_name="diffsynth", standalone_mode=False)
    return ours, (capsys.readouterr().out, ended.value.code)


def lines_of(path: tuple[str, ...]) -> Iterator[tuple[list[str], str]]:
    """Return queries about a command: each prefix of each option, each option, each partial value, and arguments."""
    entry = LEAVES[path]
    words = list(path)
    yield from ((words, incomplete) for incomplete in ("", "-", "x", "="))
    names = [name for option in entry["options"] for name in option["names"]]
    yield from ((words, start) for start in sorted({name[:length] for name in names for length in range(1, 99)}))
    for option in entry["options"]:
        for name in option["names"]:
            given = [name] if option["is_flag"] else [name, "1"]
            yield [*words, *given], "--"
            yield [*words, *given], ""
            if not option["is_flag"]:
                yield [*words, f"{name}=1"], name[:4]
                yield from (([*words, name], begun) for begun in ("", "--", "=", *(v[:2] for v in option["values"])))
                yield words, f"{name}={(option['values'] or ['x'])[0][:1]}"
    for values in ([], ["a"], ["a", "b"], ["-"], ["a", names[0]]):
        yield [*words, *values], ""
        yield [*words, *values], "q"
        yield [*words, *values], "--"


def test_every_command_has_a_leaf():
    assert {path[0] for path in LEAVES} == set(COMMANDS)
    assert len(LEAVES) > len(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_the_table_answers_as_typer_does(remembered, monkeypatch, capsys, typers, path):
    for words, incomplete in lines_of(path):
        ours, theirs = both(monkeypatch, capsys, typers, "bash", words, incomplete)
        assert ours == theirs, (words, incomplete)


@pytest.mark.parametrize(("shell", "environment"), SHELLS)
def test_each_shell_is_answered_as_typer_does(remembered, monkeypatch, capsys, typers, shell, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines = [([], ""), ([], "-"), ([], "tra"), ([], "xyz"), (["dataset"], ""), (["recipe"], "s")]
    lines += [([*path], incomplete) for path in LEAVES for incomplete in ("", "--", "--x")]
    lines += [(["train", "--recipe"], "flux.1"), (["train", "--task"], ""), (["train", "--lora_rank", "4"], "--l")]
    for words, incomplete in lines:
        ours, theirs = both(monkeypatch, capsys, typers, shell, words, incomplete)
        assert ours == theirs, (words, incomplete)


def test_the_last_word_may_lack_its_closing_quote(remembered, monkeypatch, capsys, typers):
    for words in (["train", "--recipe", "'qwen-image-lora"], ["train", '"--recipe"', "'flux.1-k"]):
        ours, theirs = both(monkeypatch, capsys, typers, "zsh", words[:-1], words[-1])
        assert ours == theirs
        assert ours != ("_files\n", 0)


@pytest.mark.parametrize(
    "words",
    [["trian"], ["train", "--x"], ["train", "--"], ["train", "-xy"], ["--version", "train"], ["train", "--rehearse=1"]],
)
def test_what_is_intricate_is_left_to_typer(remembered, monkeypatch, capsys, words):
    ask(monkeypatch, "bash", words, "--re")
    assert complete() is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("request_", ["source_bash", "complete_csh", "complete"])
def test_another_request_is_left_to_typer(remembered, monkeypatch, request_):
    ask(monkeypatch, "bash", ["train"], "--re")
    monkeypatch.setenv("_DIFFSYNTH_COMPLETE", request_)
    assert complete() is None


def test_the_table_is_read_until_a_source_changes(monkeypatch, capsys):
    remember_commands()
    path = table_path()
    table = json.loads(path.read_bytes())
    assert {str(recipe_folder()), *(name for name in sources() if "options.py" in name)} <= set(table["stamps"])
    table["root"]["commands"] = {"marked": table["root"]["commands"]["train"]}
    path.write_text(json.dumps(table))
    assert list(remembered_commands()["commands"]) == ["marked"]

    changed = path.with_name("source.py")
    changed.write_text("")
    facts = changed.stat()
    table["stamps"][str(changed)] = [facts.st_size, facts.st_mtime_ns]
    path.write_text(json.dumps(table))
    assert list(remembered_commands()["commands"]) == ["marked"]
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert remembered_commands() is None
    ask(monkeypatch, "bash", [], "tr")
    assert complete() == 0
    assert capsys.readouterr().out == "train\n"
    assert list(remembered_commands()["commands"]) == list(COMMANDS)
    changed.unlink()


def test_a_source_that_is_gone_makes_a_table_old():
    remember_commands()
    path = table_path()
    table = json.loads(path.read_bytes())
    table["stamps"][str(path.with_name("gone.py"))] = [0, 0]
    path.write_text(json.dumps(table))
    assert remembered_commands() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"stamps": 1}', b'{"stamps": {}}', b"\xff"])
def test_a_damaged_table_is_made_again(monkeypatch, capsys, content):
    path = table_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    ask(monkeypatch, "bash", [], "tr")
    assert complete() == 0
    assert capsys.readouterr().out == "train\n"
    assert remembered_commands() == TABLE


def test_where_nothing_can_be_written_the_answer_is_the_same(monkeypatch, capsys, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    for folder in (blocked, None):
        if folder:
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        else:
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr("diffsynth_cli.remembered_commands.cache_folder", lambda: None)
        ask(monkeypatch, "bash", ["recipe"], "sh")
        assert complete() == 0
        assert capsys.readouterr().out == "show\n"
