"""Faults of rows, captions, paths and metadata to plant in a dataset, each with exactly the findings that it must
cause.

Those of images and videos are in faults_of_files.py.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.faults_of_files import Expected, Plant
from tests.validation_corpus import Draft


def cell(code: str, value: str, path: str | None = None) -> Plant:
    """A cell without a file that can be opened."""
    return lambda draft: {(code, draft.row(value), path or value)}


def text(code: str, caption: Any) -> Plant:
    """A caption."""
    return lambda draft: {(code, draft.sound_row(caption)[0], None)}


def caption_twice(draft: Draft) -> Expected:
    row, _ = draft.sound_row("an old tree")
    draft.sound_row("an old tree")
    return {("CAPTION_DUPLICATE", row, None)}


CAPTIONS: Mapping[str, Plant] = {
    "an empty caption": text("CAPTION_MISSING", ""),
    "a caption of blanks": text("CAPTION_EMPTY", " \t "),
    "a caption nan": text("CAPTION_NAN", "nan"),
    "a caption NULL": text("CAPTION_NAN", "NULL"),
    "a caption None": text("CAPTION_NAN", " None"),
    "a caption that is there twice": caption_twice,
    "a caption of a thousand words": text("CAPTION_TOO_LONG", "a red bird on a very old tree " * 130),
    "a bell": text("CAPTION_CONTROL_CHARS", "a bird\x07 on a tree"),
    "a blank without width": text("CAPTION_CONTROL_CHARS", "a bird\u200b on a tree near a lake"),
    "marks of direction": text("CAPTION_CONTROL_CHARS", "\u202ea bird on a branch\u202c"),
}


def other_letters(draft: Draft) -> Expected:
    draft.photograph().save(draft.folder / "Bird.png")
    row = draft.row("bird.PNG")
    return {("PATH_CASE", row, "bird.PNG"), ("FILE_UNREFERENCED", None, "Bird.png")}


def link_out(draft: Draft) -> Expected:
    outside = draft.folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    draft.photograph().save(outside / "secret.png")
    (draft.folder / "link.png").symlink_to(outside / "secret.png")
    return {("PATH_OUTSIDE", draft.row("link.png"), "link.png")}


def folder_link_out(draft: Draft) -> Expected:
    outside = draft.folder.parent / "outside folder"
    outside.mkdir(exist_ok=True)
    draft.photograph().save(outside / "secret.png")
    (draft.folder / "linked").symlink_to(outside, target_is_directory=True)
    return {("PATH_OUTSIDE", draft.row("linked/secret.png"), "linked/secret.png")}


def unused(draft: Draft) -> Expected:
    draft.photograph().save(draft.folder / "unused.jpg")
    return {("FILE_UNREFERENCED", None, "unused.jpg")}


def misspelled(draft: Draft) -> Expected:
    draft.photograph().save(draft.folder / "the bird.png")
    row = draft.row("the brid.png")
    return {("PATH_MISSING", row, "the brid.png"), ("FILE_UNREFERENCED", None, "the bird.png")}


def locked_folder(draft: Draft) -> Expected:
    folder = draft.folder / "locked"
    folder.mkdir()
    draft.photograph().save(folder / "bird.png")
    folder.chmod(0)
    return {("FOLDER_UNREADABLE", None, "locked")}


def row_in_a_locked_folder(draft: Draft) -> Expected:
    return locked_folder(draft) | {("PATH_MISSING", draft.row("locked/bird.png"), "locked/bird.png")}


PATHS: Mapping[str, Plant] = {
    "a file that is not there": cell("PATH_MISSING", "nowhere/image.png"),
    "a misspelled file": misspelled,
    "other letters": other_letters,
    "out by dots": cell("PATH_OUTSIDE", "../secret.png"),
    "out by dots in the middle": cell("PATH_OUTSIDE", "a/../../secret.png", "../secret.png"),
    "an absolute path": cell("PATH_OUTSIDE", "/etc/passwd"),
    "a path of Windows": cell("PATH_OUTSIDE", "C:\\images\\bird.png"),
    "a link out": link_out,
    "a folder that leads out": folder_link_out,
    "an address": cell("URL", "https://example.com/bird.png"),
    "an address of a bucket": cell("URL", "s3://images/bird.png"),
    "an unused image": unused,
    "an image in a folder that may not be read": row_in_a_locked_folder,
}


def twice(draft: Draft) -> Expected:
    _, name = draft.sound_row("a row that is there twice")
    return {("ROW_DUPLICATE", draft.row(name, "a row that is there twice"), None),
            ("CAPTION_DUPLICATE", len(draft.rows) - 1, None)}  # fmt: skip


def two_files(draft: Draft) -> Expected:
    names = [draft.sound_row()[1] for _ in range(2)]
    del draft.rows[-2:]
    return {("PAIR_COUNT", draft.row(json.dumps(names)), None)}


def ragged(draft: Draft) -> Expected:
    return {("PARSE_ERROR", draft.line("a.png,a bird" + ", and more" * 9), "metadata.csv")}


def unknown_column(draft: Draft) -> Expected:
    draft.more_columns.append("width_of_the_frame")
    return {("COLUMN_UNKNOWN", None, None)}


ROWS: Mapping[str, Plant] = {
    "a row twice": twice,
    "an empty cell": lambda draft: {("CELL_EMPTY", draft.row(""), None)},
    "two files where one is trained on": two_files,
    "too many cells": ragged,
    "a column that nothing reads": unknown_column,
}


def named(name: str, cell: str) -> Plant:
    """A valid image with an unusual name."""

    def plant(draft: Draft) -> Expected:
        draft.photograph().save(draft.folder / name)
        draft.row(cell)
        return set()

    return plant


def valid_caption(caption: str) -> Plant:
    """A valid caption."""

    def plant(draft: Draft) -> Expected:
        draft.sound_row(caption)
        return set()

    return plant


def shown_by_a_link(draft: Draft) -> Expected:
    draft.photograph().save(draft.folder / "linked to.png")
    (draft.folder / "a link.png").symlink_to("linked to.png")
    draft.row("a link.png")
    return set()


HARMLESS: Mapping[str, Plant] = {
    "a path with a dot": named("dot.png", "./dot.png"),
    "a path with blanks around": named("blank.png", " blank.png "),
    "a path in a list": named("list.png", '["list.png"]'),
    "a name with a bracket": named("[1] bird.png", "[1] bird.png"),
    "a name with accents": named("Übermut é 鳥.png", "Übermut é 鳥.png"),
    "a caption of several lines": valid_caption('first a "bird",\nthen a tree'),
    "a caption of emoji": valid_caption("a family 👨‍👩‍👧 near a lake"),
    "a caption in Persian": valid_caption("می‌خواهم پرنده‌ای را ببینم"),
    "a caption in Japanese": valid_caption("湖のそばの木にとまる赤い鳥"),
    "a caption about nothing": valid_caption("nan bread on a table, none left"),
    "a link within": shown_by_a_link,
}
"""Unusual, but not a fault."""


OBJECTS: Mapping[str, Plant] = {
    "a broken line": lambda draft: {
        ("PARSE_ERROR", draft.line('{"image": "a.png", "prompt": "a bi'), "metadata.jsonl")
    },
    "a list for a row": lambda draft: {("PARSE_ERROR", draft.line('["a.png", "a bird"]'), "metadata.jsonl")},
    "a number for a path": lambda draft: {("CELL_TYPE", draft.row(7), None)},
    "a list for a caption": text("CELL_TYPE", ["a bird"]),
    "a number for a caption": text("CELL_TYPE", 7),
    "NaN for a caption": text("CAPTION_NAN", float("nan")),
    "null for a path": lambda draft: {("CELL_EMPTY", draft.row(None), None)},
    "an unpaired surrogate": text("CAPTION_CONTROL_CHARS", "a bird \ud83d"),
}
"""Faults of a metadata.jsonl."""


def shared_caption(draft: Draft) -> Expected:
    name = draft.rows[0]["image"]  # type: ignore[index]
    other = Path(name).with_suffix(".webp").name
    draft.photograph().save(draft.folder / other)
    return {("STEM_COLLISION", 2, other), ("CAPTION_DUPLICATE", 1, None)}


def lone_caption(draft: Draft) -> Expected:
    (draft.folder / "zebra.txt").write_text("a zebra")
    return {("FILE_UNREFERENCED", None, "zebra.txt")}


def after_writing(change: Callable[[Path], object], expected: Expected) -> Plant:
    """A change of the folder after the captions are written next to the images."""

    def plant(draft: Draft) -> Expected:
        draft.write_beside()
        change(draft.folder)
        return expected

    return plant


CAPTION_FILES: Mapping[str, Plant] = {
    "two images with one caption": lambda draft: (draft.write_beside(), shared_caption(draft))[1],
    "a caption without an image": lambda draft: (draft.write_beside(), lone_caption(draft))[1],
    "a folder that may not be read": lambda draft: (draft.write_beside(), locked_folder(draft))[1],
    "no caption beside": after_writing(
        lambda folder: (folder / "sound_2.txt").unlink(), {("CAPTION_MISSING", 2, "sound_2.png")}
    ),
    "an empty caption beside": after_writing(
        lambda folder: (folder / "sound_2.txt").write_text("\n"), {("CAPTION_EMPTY", 2, None)}
    ),
    "two captions beside": after_writing(
        lambda folder: (folder / "sound_2.caption").write_text("another"), {("CAPTION_AMBIGUOUS", 2, "sound_2.png")}
    ),
    "a caption beside, in capitals": after_writing(
        lambda folder: (folder / "sound_2.txt").rename(folder / "sound_2.TXT"), set()
    ),
    "a photo of a phone and its caption": after_writing(
        lambda folder: [(folder / f"x.{ending}").write_text("x") for ending in ("jxl", "txt")],
        {("FORMAT_UNSUPPORTED", None, "x.jxl")},
    ),
    "a letter": after_writing(lambda folder: (folder / "a.docx").write_text("x"), {("FILE_UNKNOWN", None, "a.docx")}),
    "a resource fork": after_writing(
        lambda folder: (folder / "._sound_2.png").write_text("x"), {("FILE_LEFTOVER", None, None)}
    ),
    "a caption in Latin-1": after_writing(
        lambda folder: (folder / "sound_3.txt").write_bytes("ein Löwe".encode("latin-1")),
        {("NOT_UTF8", 3, "sound_3.txt")},
    ),
}
"""Faults of three images with captions in text files."""


def metadata(name: str, make: Callable[[Draft], bytes], expected: Expected) -> Plant:
    """A whole metadata file."""

    def plant(draft: Draft) -> Expected:
        (draft.folder / name).write_bytes(make(draft))
        return expected

    return plant


def column_renamed(old: str, new: str) -> Callable[[Draft], bytes]:
    return lambda draft: draft.text().replace(old, new, 1).encode()


WHOLE: Mapping[str, Plant] = {
    "UTF-16": metadata("metadata.csv", lambda draft: draft.text().encode("utf-16"), {("NOT_UTF8", None, "metadata.csv")}),
    "Latin-1": metadata(
        "metadata.csv", lambda draft: f"{draft.text()}x.png,ein Löwe\n".encode("latin-1"),
        {("NOT_UTF8", None, "metadata.csv")},
    ),
    "an open quote": metadata(
        "metadata.csv", lambda draft: f'{draft.text()}x.png,"a bird\n'.encode(), {("PARSE_ERROR", None, "metadata.csv")}
    ),
    "broken JSON": metadata(
        "metadata.json", lambda draft: draft.text("json").encode()[:-5], {("PARSE_ERROR", None, "metadata.json")}
    ),
    "an object for a list": metadata(
        "metadata.json", lambda draft: b'{"rows": []}', {("PARSE_ERROR", None, "metadata.json")}
    ),
    "a header alone": metadata("metadata.csv", lambda draft: b"image,prompt\n", {("EMPTY", None, "metadata.csv")}),
    "metadata twice": lambda draft: (
        draft.write(),
        metadata("metadata.jsonl", lambda draft: b"", {("METADATA_UNUSED", None, None)})(draft),
    )[1],
    "a table that is not read": lambda draft: (
        draft.write_beside(),
        metadata("metadata.parquet", lambda draft: b"PAR1", {("METADATA_UNUSED", None, None)})(draft),
    )[1],
    "an empty list": metadata("metadata.json", lambda draft: b"[]", {("EMPTY", None, "metadata.json")}),
    "nothing": lambda draft: ([path.unlink() for path in draft.folder.iterdir()], {("EMPTY", None, None)})[1],
    "a misspelled column": metadata(
        "metadata.csv", column_renamed("prompt", "promt"), {("COLUMN_MISSING", None, None)}
    ),
    "a column of another tool": metadata(
        "metadata.csv", column_renamed("prompt", "text"), {("COLUMN_MISSING", None, None)}
    ),
    "one caption for all": metadata(
        "metadata.csv", lambda draft: b"image,prompt\n" + b"".join(b"sound_%d.png,a dog\n" % row for row in (1, 2, 3)),
        {("CAPTION_ALL_SAME", None, None)},
    ),
}  # fmt: skip
"""Faults of a set of three images that are planted alone, because they hide others."""
