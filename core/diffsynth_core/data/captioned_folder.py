"""A folder with captions in text files next to the media: the role of each file, and notes on skipped ones. No
torch.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from diffsynth_core.data.file_index import Listing
from diffsynth_core.data.formats import CONVERSIONS, Kind, ending_of, kind_of_file, leftover_of
from diffsynth_core.errors import Problem, list_names
from diffsynth_core.progress import pluralize, verb

NOT_SAMPLES: Mapping[str, frozenset[str]] = {"image": frozenset({"clip"}), "video": frozenset()}
"""Kind of the target -> kinds of media that are not samples."""
SHOWN_FILES = 3
"""Maximum number of files in a message."""


@dataclass(frozen=True)
class CaptionedFolder:
    """All files of a folder, each in exactly one list, by relative path with `/`, in order.

    Attributes:
        rows: image or clip -> the captions next to it, of which there should be one.
        captions: captions of `rows`, `other_media` and `unsupported`.
        other_media: clips, if images are trained on.
        unsupported: images and clips that nothing installed can decode.
        leftovers: files of systems and programs, by program; for folders that are not searched, their name.
        metadata: files with the name of a metadata file.
    """

    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    lone_captions: tuple[str, ...] = ()
    other_media: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    captioned_unsupported: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    leftovers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def shared_captions(self) -> Iterator[tuple[str, str, str]]:
        """Yield (first, second, caption): two samples with the same caption file."""
        first: dict[str, str] = {}
        for name, captions in self.rows.items():
            for caption in captions:
                other = first.setdefault(caption, name)
                if other != name:
                    yield other, name, caption

    def rival_captions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield samples with several caption files, and these."""
        yield from ((name, captions) for name, captions in self.rows.items() if len(captions) > 1)


def sort_folder(listing: Listing, kind: str, metadata_names: tuple[str, ...] = ()) -> CaptionedFolder:
    """Assign each file of a listing to its role, where `kind` (`image` or `video`) is the target.

    Args:
        metadata_names: names of files that are not samples, because they are used as metadata or would be.
    """
    kinds = {name: kind_of_file(listing.base / name) for name in listing.files if name not in metadata_names}
    media = _of(kinds, "image", "clip")
    rows = [name for name in media if kinds[name] not in NOT_SAMPLES[kind]]
    other = [name for name in media if kinds[name] in NOT_SAMPLES[kind]]
    captions = _of(kinds, "caption")
    by_stem: dict[str, list[str]] = {}
    for caption in captions:
        by_stem.setdefault(stem_key(caption), []).append(caption)
    of_rows = {name: tuple(by_stem.get(stem_key(name), ())) for name in rows}
    taken = {caption for some in of_rows.values() for caption in some}
    unsupported = _of(kinds, "unsupported")
    captioned = [name for name in unsupported if set(by_stem.get(stem_key(name), ())) - taken]
    taken |= {
        caption for name in (*other, *unsupported, *listing.leaving) for caption in by_stem.get(stem_key(name), ())
    }
    leftovers: dict[str, list[str]] = {}
    for name in _of(kinds, "leftover"):
        leftovers.setdefault(leftover_of(name.rpartition("/")[2]) or "ComfyUI", []).append(name)
    for folder, what in sorted(listing.leftover_folders.items()):
        leftovers.setdefault(what, []).append(f"{folder}/")
    return CaptionedFolder(
        rows=of_rows,
        captions=tuple(name for name in captions if name in taken),
        lone_captions=tuple(name for name in captions if name not in taken),
        other_media=tuple(other),
        unsupported=tuple(name for name in unsupported if name not in captioned),
        captioned_unsupported=tuple(captioned),
        unknown=_of(kinds, "unknown"),
        leftovers={what: tuple(names) for what, names in leftovers.items()},
        metadata=tuple(name for name in metadata_names if name in listing.files),
        links=tuple(sorted(listing.leaving)),
    )


def _of(kinds: Mapping[str, Kind], *wanted: Kind) -> tuple[str, ...]:
    """Return the names of some kinds, sorted by folder."""
    return tuple(sorted((name for name, kind in kinds.items() if kind in wanted), key=lambda name: name.split("/")))


def stem_key(name: str) -> str:
    """Return what an image and its caption share: the path without suffix, with normalized accents."""
    ending = ending_of(name)
    return unicodedata.normalize("NFC", name[: len(name) - len(ending)])


def expected_caption(name: str) -> str:
    """Return the first path at which the caption of an image or clip is looked up."""
    return f"{name[: len(name) - len(ending_of(name))]}.txt"


def unsupported_problem(names: tuple[str, ...], captioned: bool) -> Problem:
    """Return the problem of media that nothing installed can decode; `captioned`: they have captions."""
    captions_note = (", but " + ("it has a caption" if len(names) == 1 else "they have captions")) if captioned else ""
    hints = dict.fromkeys(CONVERSIONS.get(ending_of(name), CONVERSIONS[".heic"]) for name in names)
    what = f"`{names[0]}`" if len(names) == 1 else _listed(names, "file")
    formats = "has an unsupported format" if len(names) == 1 else "have unsupported formats"
    return Problem(f"{what} {formats}{captions_note}", "; ".join(hints), code="FORMAT_UNSUPPORTED")


def leftovers_note(leftovers: Mapping[str, tuple[str, ...]]) -> str:
    """Return one line about skipped files."""
    count = sum(map(len, leftovers.values()))
    listed = ", ".join(f"{len(names)} from {what} (`{names[0]}`)" for what, names in leftovers.items())
    return f"{pluralize(count, 'file or folder', 'files and folders')} skipped: {listed}"


def folder_notes(folder: CaptionedFolder) -> tuple[str, ...]:
    """Return notes about files that are not read, one per kind."""
    notes = []
    if folder.unsupported:
        problem = unsupported_problem(folder.unsupported, captioned=False)
        notes.append(f"{problem.message} ({problem.hint})")
    if folder.other_media:
        notes.append(
            f"{_listed(folder.other_media, 'video')} {_are(folder.other_media)} not used: training uses images"
        )
    if folder.lone_captions:
        has = verb(len(folder.lone_captions), "has", "have")
        notes.append(f"{_listed(folder.lone_captions, 'caption')} {has} no image or clip")
    if folder.unknown:
        notes.append(
            f"{_listed(folder.unknown, 'file')} {_are(folder.unknown)} not read: not an image, clip or caption"
        )
    if folder.links:
        notes.append(f"{_listed(folder.links, 'link')} {_are(folder.links)} not followed: target outside the dataset")
    if folder.leftovers:
        notes.append(leftovers_note(folder.leftovers))
    return tuple(notes)


def _are(names: tuple[str, ...]) -> str:
    return verb(len(names), "is", "are")


def _listed(names: tuple[str, ...], noun: str) -> str:
    return f"{pluralize(len(names), noun)} ({list_names(names, SHOWN_FILES)})"
