"""Prompts to draw: those on the command line and in a file. No torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_core.data.metadata import READERS, read_metadata
from diffsynth_core.data.texts import SAVE_AS_UTF8, decode_text, likely_encoding
from diffsynth_core.errors import Problem, kind_of, list_names, report, suggest, truncate
from diffsynth_core.json_files import InvalidJson, parse_json
from diffsynth_core.models.dataset_columns import TARGET_COLUMNS, TEXT_COLUMN
from diffsynth_core.models.registry import image_inputs

NEGATIVE, SEED = "negative_prompt", "seed"
"""Columns of a prompts file besides the prompt and its images."""
LARGEST_SEED = 2**63 - 1
"""As for the parameter `seed`."""
SUFFIXES = (".txt", *READERS)
"""Suffixes of prompts files."""
UNREADABLE = re.compile("[\0\ud800-\udfff]")
"""A NUL, which no file name or metadata can hold, and an unpaired surrogate, which no text encoder accepts."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and what is set for it alone.

    Attributes:
        where: its name in messages.
        images: extra input -> files.
    """

    where: str
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


def rows_of_options(prompts: Mapping[str, str]) -> list[PromptRow]:
    """Return the prompts of the command line, from what gives each in messages -> its text. Reports problems."""
    rows = [PromptRow(where, prompt) for where, prompt in prompts.items()]
    report(*(problem for row in rows for problem in _text_problems(row.where, row.prompt)))
    return rows


def read_prompts(path: Path, option: str) -> list[PromptRow]:
    """Return the prompts in a file, which an option such as `--prompts` names. Reports problems.

    A text file has a prompt per line; blank lines are skipped. A table has the column `prompt`, and may have
    `negative_prompt`, `seed` and the extra inputs of the model, whose files are relative to the table.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        report(Problem(f"`{option}` `{path}` is not a prompts file: expected {known}", "pass another file", True))
        return []
    if not path.is_file():
        what = f"`{option}` `{path}` is a folder" if path.is_dir() else f"`{option}` `{path}` does not exist"
        report(Problem(what, "pass a file with prompts", wrong_use=True))
        return []
    try:
        found = _lines(path) if path.suffix.lower() == ".txt" else _table(path)
    except OSError as error:
        report(Problem(f"`{option}` `{path}` cannot be read: {error.strerror}", "change its permissions"))
        return []
    report(*(problem for row in found for problem in _text_problems(row.where, row.prompt)))
    return found


def _lines(path: Path) -> list[PromptRow]:
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        report(Problem(f"`{path}` is not UTF-8 (byte {error.start}){likely_encoding(error)}", SAVE_AS_UTF8))
        return []
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    rows = [PromptRow(f"`{path}` line {number}", line) for number, line in lines if line]
    if not rows:
        report(Problem(f"`{path}` has no prompts", "write one prompt per line"))
    return rows


def _table(path: Path) -> list[PromptRow]:
    table = read_metadata(path.parent, path, TEXT_COLUMN, TARGET_COLUMNS[-1])
    faults = [one for one in table.findings if one.level == "error"]
    report(*(Problem(one.message, "add one row per prompt" if one.code == "EMPTY" else one.hint) for one in faults))
    if not table.rows:
        return []
    if TEXT_COLUMN not in table.columns:
        what = f"`{path}` has no column `{TEXT_COLUMN}`; it has {list_names(table.columns)}"
        report(Problem(what, f"name the column of the prompts `{TEXT_COLUMN}`"))
        return []
    report(*_unknown_columns(path, table.columns))
    return [row for number, cells in table.rows.items() if (row := _row(path, number, cells))]


def _unknown_columns(path: Path, columns: Sequence[str]) -> Iterator[Problem]:
    """Yield problems of columns that nothing reads; those of targets are skipped, as in the metadata of a dataset."""
    known = (TEXT_COLUMN, NEGATIVE, SEED, *image_inputs())
    for name in columns:
        if name not in (*known, *TARGET_COLUMNS):
            near = suggest(name, known)
            hint = f"did you mean `{near}`?" if near else f"remove it; known columns: {', '.join(known)}"
            yield Problem(f"`{path}` has the column `{name}`, which is not read", hint)


def _row(path: Path, number: int, cells: Mapping[str, Any]) -> PromptRow | None:
    """Return a row; None if it has a fault, which is reported."""
    where = f"`{path}` row {number}"
    faults: list[Problem] = []
    prompt = cells.get(TEXT_COLUMN)
    if not isinstance(prompt, str) or not prompt.strip():
        what = f"{where}: the column `{TEXT_COLUMN}` holds {kind_of(prompt)}" if prompt else f"{where} has no prompt"
        faults.append(Problem(what, "write the prompt, or remove the row"))
    negative = cells.get(NEGATIVE)
    if negative is not None and not isinstance(negative, str):
        faults.append(Problem(f"{where}: `{NEGATIVE}` holds {kind_of(negative)}", "write it as a string"))
    faults += _text_problems(where, negative) if isinstance(negative, str) else []
    seed, images = cells.get(SEED), {}
    if seed not in (None, "") and _seed(seed) is None:
        what = f"{where}: `{SEED}` is `{truncate(str(seed))}`, expected an integer of at least 0"
        faults.append(Problem(what, "correct it, or leave the cell empty"))
    for name in image_inputs():
        names = _names(cells.get(name))
        if names is None:
            what = f"{where}: `{name}` holds `{truncate(str(cells[name]))}`, expected a path or a list of paths"
            faults.append(Problem(what, "write the path as a string"))
        elif names:
            images[name] = tuple(path.parent / one for one in names)
    report(*faults)
    return None if faults else PromptRow(where, str(prompt), negative or None, _seed(seed), images)


def _seed(value: Any) -> int | None:
    """Return the seed in a cell; None if it is none."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= LARGEST_SEED else None


def _names(value: Any) -> list[str] | None:
    """Return the files in a cell, a path or a list of paths; None if it holds something else."""
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(InvalidJson):  # a file name may begin with a bracket
            value = parse_json(value)
    names = [] if value in (None, "", []) else value if isinstance(value, list) else [value]
    return names if all(isinstance(name, str) and name and "\0" not in name for name in names) else None


def _text_problems(where: str, text: str) -> list[Problem]:
    """Return the problem of a text with characters that cannot be encoded."""
    bad = UNREADABLE.search(text)
    if not bad:
        return []
    return [Problem(f"{where} contains U+{ord(bad[0]):04X}, which no text encoder reads", "remove it")]
