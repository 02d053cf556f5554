"""Metadata of a dataset: csv, json, jsonl, or captions in text files beside the media. No torch."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffsynth_core.data.captioned_folder import (
    CaptionedFolder,
    expected_caption,
    folder_notes,
    sort_folder,
    unsupported_problem,
)
from diffsynth_core.data.file_index import list_files
from diffsynth_core.data.formats import kind_of_name
from diffsynth_core.data.texts import decode_text, likely_encoding, read_caption
from diffsynth_core.errors import (
    DiffSynthError,
    FaultsFound,
    Problem,
    kind_of,
    list_names,
    raise_if_any,
    suggest,
    truncate,
)
from diffsynth_core.files import atomic_write
from diffsynth_core.json_files import InvalidJson, parse_json

METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
ENDINGS_OF_METADATA = (".csv", ".json", ".jsonl")
LEAVE_OUT = "remove or rename it"
"""What to do about a column that is not read."""
UNREAD_NAMES = ("metadata.parquet", "metadata.tsv", "metadata.xlsx", "metadata.xls", "metadata.ods", "metadata.yaml")
"""Files that are taken for metadata, and are not."""
OTHER_NAMES = {
    "image": ("file_name", "filename", "file", "path", "image_path", "img", "image_file"),
    "video": ("file_name", "filename", "file", "path", "video_path", "media_path"),
    "prompt": ("text", "caption", "captions", "description"),
}
"""Columns by the names that other programs give them."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""What spreadsheets write between columns in place of commas, and its name."""
SAVE_AS_UTF8 = "save it as UTF-8"
SHOWN_OF_A_PATH = 200
"""How many characters of a path a message shows: a cell may hold a whole caption instead."""


@dataclass(frozen=True)
class Metadata:
    """Rows of a dataset; `origin` says where they were read. Row numbers count samples from 1.

    `notes`: what is worth saying of what was not read. `beside`: captions stand in text files beside the media.
    """

    origin: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    beside: bool = False


def find_metadata(base: Path, given: Path | None) -> Path | None:
    """The metadata file: the given one, else the first of the documented names in `base`."""
    if given:
        return given
    return next((base / name for name in METADATA_NAMES if (base / name).is_file()), None)


def locate_metadata(base: Path, given: Path | None) -> Path | None:
    """The metadata file of the dataset in `base`; None: captions stand beside the files.

    Raises:
        DiffSynthError: when the folder or the file given is not there, or the file is of another kind.
    """
    if not base.is_dir():
        raise DiffSynthError(
            f"the dataset folder `{base}` (`dataset_base_path`) does not exist",
            "pass the folder with `--dataset_base_path`",
        )
    path = find_metadata(base, given)
    if path and not path.is_file():
        raise DiffSynthError(
            f"the metadata file `{path}` (`dataset_metadata_path`) does not exist", "fix `--dataset_metadata_path`"
        )
    if path and path.suffix.lower() not in ENDINGS_OF_METADATA:
        raise DiffSynthError(
            f"`{path}` is not a metadata file: expected .csv, .json or .jsonl", "fix `--dataset_metadata_path`"
        )
    return path


def unused_metadata(base: Path, path: Path | None) -> Problem | None:
    """What to say of files called metadata in `base` besides `path`, the one that is read; None: none is."""
    if path and path.name not in METADATA_NAMES:
        return None
    names = (*METADATA_NAMES, *UNREAD_NAMES)
    others = [name for name in names if (path is None or name != path.name) and (base / name).is_file()]
    if not others:
        return None
    what = f"`{base}` contains {list_names(others)}, which is not read"
    if path:
        return Problem(f"{what} because `{path.name}` exists", "remove the file that you do not use")
    return Problem(f"{what}: expected {', '.join(METADATA_NAMES)}", "export it as metadata.csv")


def read_metadata(base: Path, given: Path | None, text_column: str, media_column: str, kind: str = "image") -> Metadata:
    """The metadata of the dataset in `base`.

    Without a metadata file the files below `base` are the rows, each with the caption in the text file of its name:
    images, or for the kind `video` videos and images.

    Raises:
        DiffSynthError: when the folder or the file is missing, cannot be parsed, or holds no row.
    """
    path = locate_metadata(base, given)
    if path is None:
        return _read_captions_beside(base, text_column, media_column, kind)
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    try:
        metadata = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    if not metadata.rows:
        raise DiffSynthError(f"`{path}` has no rows", "add one row per sample", "EMPTY")
    unused = None if given else unused_metadata(base, path)
    return replace(metadata, notes=(*metadata.notes, unused.message)) if unused else metadata


def not_utf8(path: Path, error: UnicodeDecodeError) -> DiffSynthError:
    """The error that a text file is not UTF-8, and what it probably is."""
    what = f"`{path}` is not UTF-8 (byte {error.start}){likely_encoding(error)}"
    return DiffSynthError(what, SAVE_AS_UTF8, "NOT_UTF8")


def _read_text(path: Path) -> str:
    return decode_text(path.read_bytes())


def csv_problem(path: Path, error: csv.Error, first: int, last: int) -> Problem:
    """Why a row of a CSV, from line `first` to line `last`, cannot be read: as a rule for a quote."""
    if "expected after" in str(error):
        where = f"line {last}" if first == last else f"lines {first} to {last}"
        return Problem(f"`{path}` {where}: {error}", "double the quotes inside a cell, and close the quotes around it")
    if "limit" in str(error):
        return Problem(f"`{path}` line {first}: {error}", "shorten that cell, or close the quote opened there")
    return Problem(f"`{path}` line {first}: unterminated cell ({error})", "close the quote opened there")


def other_separator(path: Path, text: str) -> Problem | None:
    """What to say of a CSV whose first line has other marks than commas between its columns."""
    header = text.partition("\n")[0]
    name = next((name for mark, name in SEPARATORS.items() if mark in header), None)
    if name is None or "," in header:
        return None
    return Problem(f"`{path}` separates its columns with {name}, expected commas", "re-export it with commas")


def missing_column(
    origin: str, present: Sequence[str], name: str, needed: Sequence[str], near: str | None, beside: bool
) -> Problem:
    """The problem that one of the columns `needed` is not there.

    `near`: a column that may be meant. `beside`: captions stand in text files beside the media.
    """
    code = "COLUMN_MISSING"
    if beside:
        listed = ", ".join(f"`{one}`" for one in dict.fromkeys(needed))
        what = f"`{origin}` has no column `{name}`, which requires a metadata file"
        return Problem(what, f"write a metadata.csv with the columns {listed}", code=code)
    what = f"`{origin}` has no column `{name}`; it has {list_names([truncate(one) for one in present])}"
    if near:
        return Problem(what, f"rename `{near}`", code=code)
    if lacks_header(present):
        return Problem(what, f"add a header line `{','.join(dict.fromkeys(needed))}`", code=code)
    return Problem(what, "add the column", code=code)


def unread_column(origin: str, name: str, known: Sequence[str], hint: str) -> Problem:
    """What to say of a column that is not read; `known`: those that are."""
    what = f"`{origin}` has the column `{truncate(name)}`, which is not read; columns that are read: {list_names(known, 12)}"
    return Problem(what, hint, code="COLUMN_UNKNOWN")


def near_column(name: str, others: Iterable[str]) -> str | None:
    """Which of the columns `others` may be meant by one that is not there."""
    others = list(others)
    return suggest(name, others) or next((one for one in others if one.lower() in OTHER_NAMES.get(name, ())), None)


def lacks_header(columns: Sequence[str]) -> bool:
    """Whether what should name the columns is a row: it names a file."""
    return any(kind_of_name(name) in ("image", "clip") for name in columns)


def split_row(header: Sequence[str], cells: Sequence[str]) -> tuple[dict[str, str], int | None] | None:
    """A row of a CSV by column, and the place (from 1) of a value whose column has no name (None: there is none).

    Columns without a name may stand anywhere when they are empty, as spreadsheets write them. None: the row has more
    values than the header.
    """
    if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
        return None
    row = dict(zip(header, cells, strict=False))
    if "" not in row:
        return row, None
    unnamed = (
        place for place, (name, cell) in enumerate(zip(header, cells, strict=False), 1) if not name and cell.strip()
    )
    del row[""]
    return row, next(unnamed, None)


def unnamed_column(origin: str, place: int, value: str) -> Problem:
    """What to say of a column without a name that holds values."""
    return Problem(
        f"`{origin}` has values in column {place}, which has no name (`{truncate(value)}`): it is not read",
        "name it in the first line, or remove it (pandas: `to_csv(…, index=False)`)",
    )


def repeated_column(header: Sequence[str]) -> str | None:
    """The first name that two columns share."""
    named = [name for name in header if name]
    return next((name for name in dict.fromkeys(named) if named.count(name) > 1), None)


def _read_csv(path: Path) -> Metadata:
    text = _read_text(path)
    separated = other_separator(path, text)
    if separated:
        raise DiffSynthError(separated.message, separated.hint, "PARSE_ERROR")
    with io.StringIO(text, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        line = 1
        try:
            header = tuple(name.strip() for name in next(reader, []))
            twice = repeated_column(header)
            if twice:
                raise DiffSynthError(f"`{path}` has the column `{twice}` twice", "rename one of them", "PARSE_ERROR")
            rows: list[dict[str, str]] = []
            unnamed: dict[int, Problem] = {}
            line = reader.line_num + 1
            for cells in reader:
                line = reader.line_num + 1
                if not cells:
                    continue
                split = split_row(header, cells)
                if split is None:
                    raise DiffSynthError(
                        f"`{path}` row {len(rows) + 1}: {len(cells)} cells, but the header has {len(header)}",
                        "quote values that contain commas",
                        "PARSE_ERROR",
                    )
                row, place = split
                rows.append(row)
                if place and place not in unnamed:
                    unnamed[place] = unnamed_column(str(path), place, cells[place - 1])
        except csv.Error as error:
            problem = csv_problem(path, error, line, reader.line_num)
            raise DiffSynthError(problem.message, problem.hint, "PARSE_ERROR") from error
    notes = tuple(f"{problem.message} ({problem.hint})" for problem in unnamed.values())
    return Metadata(str(path), tuple(filter(None, header)), tuple(rows), notes)


def json_problem(path: Path, error: InvalidJson, line: int | None = None) -> Problem:
    """Why metadata are not JSON; `line` where one was read by itself."""
    line = line or error.line
    where = f" line {line}" if line else ""
    return Problem(f"`{path}`{where}: {error}", "fix that line" if line else "fix the file", code="PARSE_ERROR")


def _read_json(path: Path) -> Metadata:
    try:
        content = parse_json(_read_text(path), finite=False)
    except InvalidJson as error:
        raise FaultsFound([json_problem(path, error)]) from error
    if not isinstance(content, list):
        what = f"`{path}` holds {kind_of(content)}, expected a list of objects"
        raise DiffSynthError(what, "write one object per sample", "PARSE_ERROR")
    return _from_objects(path, list(enumerate(content, start=1)))


def _read_jsonl(path: Path) -> Metadata:
    objects: list[tuple[int, Any]] = []
    for line_number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            objects.append((len(objects) + 1, parse_json(line, finite=False)))
        except InvalidJson as error:
            raise FaultsFound([json_problem(path, error, line_number)]) from error
    return _from_objects(path, objects)


def _from_objects(path: Path, objects: list[tuple[int, Any]]) -> Metadata:
    columns: dict[str, None] = {}
    for number, value in objects:
        if not isinstance(value, dict):
            what = f"`{path}` row {number} is {kind_of(value)}, expected an object"
            raise DiffSynthError(what, "write one object per sample", "PARSE_ERROR")
        columns.update(dict.fromkeys(value))
    return Metadata(str(path), tuple(columns), tuple(value for _, value in objects))


def _read_captions_beside(base: Path, text_column: str, media_column: str, kind: str) -> Metadata:
    folder = sort_folder(list_files(base), kind, (*METADATA_NAMES, *UNREAD_NAMES))
    problems = _folder_problems(base, folder, text_column, media_column, kind)
    rows = []
    for name, captions in folder.rows.items():
        if len(captions) != 1:
            continue
        try:
            rows.append({media_column: name, text_column: read_caption(base / captions[0])})
        except UnicodeDecodeError as error:
            problems += not_utf8(base / captions[0], error).problems
        except OSError as error:
            what = f"`{base / captions[0]}` cannot be read: {error.strerror}"
            problems.append(Problem(what, "check its permissions", code="PATH_MISSING"))
    raise_if_any(problems)
    origin = f"{base} (captions in text files)"
    unused = unused_metadata(base, None)
    notes = (*([unused.message] if unused else []), *folder_notes(folder))
    return Metadata(origin, (media_column, text_column), tuple(rows), notes, beside=True)


def _folder_problems(
    base: Path, folder: CaptionedFolder, text_column: str, media_column: str, kind: str
) -> list[Problem]:
    """Why the files of a folder cannot all be samples, each kind of fault once."""
    problems = []
    if folder.captioned_unsupported:
        problems.append(unsupported_problem(folder.captioned_unsupported, captioned=True))
    elif not folder.rows:
        what = f"`{base}` contains neither {', '.join(METADATA_NAMES)} nor {kind}s"
        said = folder_notes(folder)
        problems.append(
            Problem(
                "; ".join((what, *said)),
                f"write a metadata.csv with the columns `{media_column}` and `{text_column}`",
                code="EMPTY",
            )
        )
    without = [name for name, captions in folder.rows.items() if not captions]
    if without:
        problems.append(
            Problem(
                f"`{base}` has no metadata file, and no caption file for {len(without)} of its {len(folder.rows)} {kind}s; the first is `{base / without[0]}`",
                f"write the caption to `{base / expected_caption(without[0])}`, or a metadata.csv with the columns `{media_column}` and `{text_column}`",
                code="CAPTION_MISSING",
            )
        )
    problems += [
        rival_captions(str(base / name), [str(base / one) for one in found]) for name, found in folder.rival_captions()
    ]
    problems += [shared_caption(*(str(base / name) for name in names)) for names in folder.shared_captions()]
    return problems


def rival_captions(name: str, captions: Sequence[str]) -> Problem:
    """The problem that an image or clip has several captions beside it."""
    what = f"`{name}` has {len(captions)} caption files: {list_names(captions)}"
    return Problem(what, "keep one of them", code="CAPTION_AMBIGUOUS")


def shared_caption(first: str, second: str, caption: str) -> Problem:
    """The problem that one caption stands beside two images or clips."""
    what = f"`{first}` and `{second}` share the caption file `{caption}`"
    return Problem(what, "move one of them, or write a metadata.csv", code="STEM_COLLISION")


def write_metadata(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a metadata.csv, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
