"""File types: images, clips, captions, and leftovers of systems and programs, declared once. No torch.

A file is classified by its name (`kind_of_name`) or, if that is inconclusive, by its first bytes (`kind_of_file`).
Images are what Pillow and its installed plugins decode, clips what ffmpeg does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import Image

Kind = Literal["image", "clip", "caption", "unsupported", "leftover", "unknown"]
"""Type of a file.

`unsupported`: an image or clip that nothing installed can decode. `leftover`: left behind by systems and programs.
`unknown`: none of these.
"""

CAPTION_ENDINGS = (".txt", ".caption")
"""Suffixes of caption files, in any case."""

CONTAINERS: Mapping[str, tuple[str, ...]] = {
    "mov": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".ismv"),
    "matroska": (".mkv", ".webm", ".mk3d"),
    "avi": (".avi", ".divx"),
    "gif": (".gif",),
    "mpegts": (".ts", ".mts", ".m2ts", ".m2t"),
    "mpeg": (".mpg", ".mpeg", ".vob", ".dvd"),
    "flv": (".flv",),
    "asf": (".wmv", ".asf"),
    "ogg": (".ogv",),
    "mxf": (".mxf",),
    "nut": (".nut",),
    "rm": (".rm", ".rmvb"),
    "wtv": (".wtv",),
    "ivf": (".ivf",),
    "yuv4mpegpipe": (".y4m",),
    "gxf": (".gxf",),
    "dv": (".dv",),
    "flic": (".fli", ".flc"),
}
"""ffmpeg container -> file suffixes. Playlists, which open other files, are excluded."""
RAW_STREAMS: Mapping[str, tuple[str, ...]] = {
    "mpegvideo": (".mpg", ".mpeg", ".m1v", ".m2v"),
    "h264": (".h264", ".264"),
    "hevc": (".h265", ".265", ".hevc"),
    "vvc": (".h266", ".266", ".vvc"),
    "obu": (".obu",),
    "m4v": (".m4v",),
    "mjpeg": (".mjpg", ".mjpeg"),
}
"""The same for streams without a container, which are recognized only by suffix because they lack a header."""
CLIP_ENDINGS = frozenset(
    ending for table in (CONTAINERS, RAW_STREAMS) for endings in table.values() for ending in endings
)
"""Suffixes of clips."""

PLUGINS: Mapping[str, str] = {
    "pillow_heif": "register_heif_opener",
    "pillow_jxl": "",
}
"""Modules that add formats to Pillow, used if installed -> function to call after import."""
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""Formats that Pillow recognizes but does not decode, or passes to another program."""
STILL_CAMERAS = (
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2",
    ".rwl", ".sr2", ".srw", ".x3f",
)  # fmt: skip
"""Raw camera files: Pillow takes some for TIFF and returns the thumbnail."""
OTHER_IMAGES = (
    ".ai", ".dpx", ".emf", ".eps", ".exr", ".hdr", ".jls", ".jxr", ".jxs", ".kra", ".pam", ".ps", ".psb", ".svg",
    ".wbmp", ".wdp", ".wmf", ".xcf", ".xwd",
)  # fmt: skip
"""Suffixes of images that cannot be decoded here."""
OTHER_CLIPS = (
    ".amv", ".apv", ".avs2", ".avs3", ".bik", ".braw", ".cavs", ".cpk", ".drc", ".evc", ".h261", ".h263", ".m3u8",
    ".mpd", ".r3d", ".roq", ".swf", ".vc1", ".vc2", ".yuv",
)  # fmt: skip
"""Suffixes of clips that cannot be decoded here."""
CONVERSIONS: Mapping[str, str] = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "convert to PNG or JPEG, or install `pillow-heif`"),
    ".jxl": "convert to PNG or JPEG, or install `pillow-jxl-plugin`",
    **dict.fromkeys(STILL_CAMERAS, "develop to PNG or JPEG"),
    **dict.fromkeys(OTHER_IMAGES, "convert to PNG or JPEG"),
    **dict.fromkeys(OTHER_CLIPS, "convert to MP4"),
}
"""Suffix of an image or clip that cannot be decoded without a plugin -> what to do."""
AUDIO_ENDINGS = (
    ".aac", ".flac", ".isma", ".m4a", ".m4b", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".ra", ".wav", ".wma",
)  # fmt: skip
"""Suffixes of audio files, which use the containers of clips."""
AMBIGUOUS = frozenset({".ts", ".mts"})
"""Suffixes of clips that other files use too: MPEG transport streams and TypeScript."""

SNIFFED_BYTES = 4096
"""Number of bytes read to determine the type of a file."""
TRANSPORT_PACKETS = (188, 192)
"""Distances between sync bytes of an MPEG transport stream; 192 with a timestamp before each packet."""
CLIP_SIGNATURES: tuple[tuple[int, bytes], ...] = (
    (0, b"\x1aE\xdf\xa3"),
    (8, b"AVI "),
    (0, b"FLV\x01"),
    (0, b"\0\0\x01\xba"),
    (0, b"OggS"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    (0, b"\x06\x0e\x2b\x34"),
    (4, b"moov"),
)
"""(offset, bytes) that identify containers: Matroska, AVI, FLV, MPEG, Ogg, ASF, MXF, QuickTime."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of HEIC images."""
JXL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a")
"""First bytes of JPEG XL images."""
WORKFLOW_MARKS = (b'"class_type"', b'"last_node_id"', b'"last_link_id"')
"""Keys of a ComfyUI workflow that no caption or metadata file has."""


@dataclass(frozen=True)
class Leftover:
    """Files and folders that one kind of program leaves behind, as lower-case patterns."""

    what: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


LEFTOVERS: tuple[Leftover, ...] = (
    Leftover("macOS", ("._*", ".ds_store", ".localized", "icon\r"), ("__macosx", ".spotlight-*", ".trashes")),
    Leftover(
        "Windows",
        ("thumbs.db", "ehthumbs*.db", "desktop.ini", "*zone.identifier", "*.lnk"),
        ("$recycle.bin", "system volume information"),
    ),
    Leftover("network storage", (), ("@eadir", "#recycle", "@recycle", "#snapshot")),
    Leftover("notebooks", ("*.ipynb", "*.pyc"), (".ipynb_checkpoints", "__pycache__")),
    Leftover(
        "unfinished downloads",
        ("*.part", "*.partial", "*.crdownload", "*.opdownload", "*.download", "*.aria2", "*.tmp", "*.temp"),
    ),
    Leftover("editors", ("~$*", ".~lock.*", "*~", "#*#", "*.swp", "*.swo", "*.bak", "*.orig")),
    Leftover("ComfyUI", ("*.latent",)),
    Leftover("cameras", ("*.aae", "*.xmp", "*.thm", "*.lrv", "*.pp3", "picasa.ini", ".picasa.ini")),
    Leftover("hidden files", (".*",), (".*",)),
)
"""Known programs; the first match counts."""
_LEFTOVER_FILES = tuple((one.what, one.files) for one in LEFTOVERS)
_LEFTOVER_FOLDERS = tuple((one.what, one.folders) for one in LEFTOVERS)


def leftover_of(name: str) -> str | None:
    """Return the program that leaves a file of this name behind, or None."""
    return _whose(name, _LEFTOVER_FILES)


def leftover_folder(name: str) -> str | None:
    """Return the program that leaves a folder of this name behind, or None."""
    return _whose(name, _LEFTOVER_FOLDERS)


def _whose(name: str, patterns: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    names, endings, others = _sorted_patterns(patterns)
    lower = name.lower()
    whose = names.get(lower) or endings.get(ending_of(lower))
    return whose or next((what for what, pattern in others if pattern.match(lower)), None)


@cache
def _sorted_patterns(
    patterns: tuple[tuple[str, tuple[str, ...]], ...],
) -> tuple[dict[str, str], dict[str, str], list[tuple[str, re.Pattern[str]]]]:
    """Return program by full name, by suffix, and by pattern, for speed: a folder may contain a million files."""
    every = [(what, one) for what, some in patterns for one in some]
    names = {one: what for what, one in every if "*" not in one}
    endings = {one[1:]: what for what, one in every if re.fullmatch(r"\*\.\w+", one)}
    others = [(what, re.compile(translate(one))) for what, one in every if one not in names and one[1:] not in endings]
    return names, endings, others


def ending_of(name: str) -> str:
    """Return the suffix of a file name or path, in lower case with its dot; empty if there is none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


@cache
def load_plugins() -> None:
    """Register all of Pillow's formats and those of installed plugins, once per process."""
    Image.init()
    for module, register in PLUGINS.items():
        if find_spec(module):
            plugin = import_module(module)
            if register:
                getattr(plugin, register)()


@cache
def image_endings() -> frozenset[str]:
    """Return the suffixes of files that Pillow can decode here."""
    load_plugins()
    decoded = Image.OPEN.keys() - NOT_DECODED
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in decoded)


def format_of_ending(ending: str) -> str | None:
    """Return Pillow's format of a suffix; None if none can be decoded here."""
    return Image.registered_extensions()[ending] if ending in image_endings() else None


def demuxers_of(path: Path) -> tuple[str, ...]:
    """Return ffmpeg's containers that a file may have, whatever its suffix, and raw streams by suffix."""
    return (*CONTAINERS, *_raw_streams(ending_of(path.name)))


def raw_stream_of(path: Path) -> str | None:
    """Return ffmpeg's raw stream for a file's suffix, if no container uses it; otherwise None."""
    ending = ending_of(path.name)
    if any(ending in endings for endings in CONTAINERS.values()):
        return None
    return next(iter(_raw_streams(ending)), None)


def _raw_streams(ending: str) -> list[str]:
    return [name for name, endings in RAW_STREAMS.items() if ending in endings]


@cache
def decoded_formats() -> tuple[str, ...]:
    """Return Pillow's formats that can be decoded here, in the order in which it tries them."""
    load_plugins()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


def kind_of_name(name: str) -> Kind | None:
    """Return the type of a file by its name; None if only its bytes decide. A GIF counts as an image, though it
    may be a clip.
    """
    return "leftover" if leftover_of(name.rpartition("/")[2]) else kind_of_ending(ending_of(name))


def kind_of_ending(ending: str) -> Kind | None:
    """Return the type by suffix only, for files in metadata rows."""
    if ending in CAPTION_ENDINGS:
        return "caption"
    if ending in image_endings() and (ending == ".gif" or ending not in CLIP_ENDINGS):
        return "image"
    if ending in CONVERSIONS:
        return "unsupported"
    if ending in AUDIO_ENDINGS:
        return "unknown"
    return "clip" if ending in CLIP_ENDINGS and ending not in AMBIGUOUS else None


def kind_of_file(path: Path) -> Kind:
    """Return the type of a file by its name or, if inconclusive, its first bytes; unknown if it cannot be opened."""
    by_name = kind_of_name(path.name)
    if by_name:
        return by_name
    head = _head(path)
    if ending_of(path.name) == ".json":
        return "leftover" if is_workflow(head) else "unknown"
    return kind_of_bytes(head, path)


def media_kind(path: Path) -> Kind:
    """Return the type of a file in a metadata row, by its suffix or, if inconclusive, its first bytes."""
    return kind_of_ending(ending_of(path.name)) or kind_of_bytes(_head(path), path)


def kind_by_content(path: Path) -> tuple[Kind, str | None]:
    """Return the type by first bytes only, and what to do if nothing installed can decode it."""
    head = _head(path)
    kind = kind_of_bytes(head, path)
    return kind, CONVERSIONS[".jxl" if head.startswith(JXL_SIGNATURES) else ".heic"] if kind == "unsupported" else None


def kind_of_bytes(head: bytes, path: Path) -> Kind:
    """Return the type of the file at `path` by its first bytes `head`, whatever its suffix."""
    if is_heif(head) or head.startswith(JXL_SIGNATURES):
        return "image" if _opens(path) else "unsupported"
    boxed = head[4:8] == b"ftyp" and head[8:11] != b"avi"  # of AVIF, avif and avis
    if boxed or any(head.startswith(mark, at) for at, mark in CLIP_SIGNATURES) or is_transport_stream(head):
        return "clip"
    return "image" if _opens(path) else "unknown"


def is_heif(head: bytes) -> bool:
    """Return whether a file starts like a HEIC image."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _head(path: Path) -> bytes:
    """Return the first bytes of a file; empty if it cannot be opened."""
    try:
        with path.open("rb") as stream:
            return stream.read(SNIFFED_BYTES)
    except OSError:
        return b""


def is_transport_stream(head: bytes) -> bool:
    """Return whether a file starts like an MPEG transport stream."""
    return any(
        len(head) > 2 * size and all(head[size - 188 + size * packet] == 0x47 for packet in (0, 1))
        for size in TRANSPORT_PACKETS
    )


def is_workflow(head: bytes) -> bool:
    """Return whether a JSON file with this start is a ComfyUI workflow."""
    return any(mark in head for mark in WORKFLOW_MARKS)


def refused_format(path: Path) -> str | None:
    """Return what to do with a file whose suffix is that of a format that cannot be decoded here; None if it can."""
    ending = ending_of(path.name)
    return CONVERSIONS[ending] if kind_of_ending(ending) == "unsupported" else None


@cache
def _formats_with_signature() -> tuple[str, ...]:
    """Return Pillow formats with a signature; the others would accept any file."""
    load_plugins()
    return tuple(name for name, (_, accept) in Image.OPEN.items() if accept and name not in NOT_DECODED)


def _opens(path: Path) -> bool:
    """Return whether Pillow recognizes a file by its first bytes."""
    try:
        with Image.open(path, formats=_formats_with_signature()) as image:
            return min(image.size) > 0
    except Exception:
        return False
