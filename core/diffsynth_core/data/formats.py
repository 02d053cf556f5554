"""Which file is an image, a clip, a caption, or what systems and programs leave behind: the one declaration. No torch.

A file is judged by its name (`kind_of_name`); where the name says nothing, or may mean something else, by its first
bytes (`kind_of_file`). Images are what Pillow and its installed plugins decode, clips what ffmpeg does.
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
"""`unsupported`: an image or clip that nothing installed here decodes. `leftover`: what systems and programs leave
behind. `unknown`: none of all these."""

CAPTION_ENDINGS = (".txt", ".caption")
"""Of the text beside an image or clip that is its caption, in any case."""

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
"""ffmpeg's name of a container -> endings of its files. Playlists, which open other files, are not among them."""
RAW_STREAMS: Mapping[str, tuple[str, ...]] = {
    "mpegvideo": (".mpg", ".mpeg", ".m1v", ".m2v"),
    "h264": (".h264", ".264"),
    "hevc": (".h265", ".265", ".hevc"),
    "vvc": (".h266", ".266", ".vvc"),
    "obu": (".obu",),
    "m4v": (".m4v",),
    "mjpeg": (".mjpg", ".mjpeg"),
}
"""The same of streams without a container: having no header to be known by, they are tried by their ending alone."""
CLIP_ENDINGS = frozenset(
    ending for table in (CONTAINERS, RAW_STREAMS) for endings in table.values() for ending in endings
)

PLUGINS: Mapping[str, str] = {
    "pillow_heif": "register_heif_opener",
    "pillow_jxl": "",
}
"""Modules that teach Pillow further formats, used where they are installed -> what to call after importing them."""
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""Formats that Pillow names without decoding them, or hands to another program."""
STILL_CAMERAS = (
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2",
    ".rwl", ".sr2", ".srw", ".x3f",
)  # fmt: skip
"""Raw data of cameras: Pillow takes some for a TIFF and gives the thumbnail in it."""
OTHER_IMAGES = (
    ".ai", ".dpx", ".emf", ".eps", ".exr", ".hdr", ".jls", ".jxr", ".jxs", ".kra", ".pam", ".ps", ".psb", ".svg",
    ".wbmp", ".wdp", ".wmf", ".xcf", ".xwd",
)  # fmt: skip
OTHER_CLIPS = (
    ".amv", ".apv", ".avs2", ".avs3", ".bik", ".braw", ".cavs", ".cpk", ".drc", ".evc", ".h261", ".h263", ".m3u8",
    ".mpd", ".r3d", ".roq", ".swf", ".vc1", ".vc2", ".yuv",
)  # fmt: skip
CONVERSIONS: Mapping[str, str] = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "convert to PNG or JPEG, or install `pillow-heif`"),
    ".jxl": "convert to PNG or JPEG, or install `pillow-jxl-plugin`",
    **dict.fromkeys(STILL_CAMERAS, "develop to PNG or JPEG"),
    **dict.fromkeys(OTHER_IMAGES, "convert to PNG or JPEG"),
    **dict.fromkeys(OTHER_CLIPS, "convert to MP4"),
}
"""Endings of images and clips that are not decoded here unless a plugin does -> what to do."""
AUDIO_ENDINGS = (
    ".aac", ".flac", ".isma", ".m4a", ".m4b", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".ra", ".wav", ".wma",
)  # fmt: skip
"""Endings of sound, which stands in the containers of clips."""
AMBIGUOUS = frozenset({".ts", ".mts"})
"""Endings of clips that other files have as well: MPEG transport streams, and TypeScript."""

SNIFFED_BYTES = 4096
TRANSPORT_PACKETS = (188, 192)
"""Bytes after which the mark of an MPEG transport stream comes again; 192 with a time in front of each packet."""
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
"""(place, bytes) by which containers are known: Matroska, AVI, FLV, MPEG, Ogg, ASF, MXF, QuickTime."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JXL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a")
WORKFLOW_MARKS = (b'"class_type"', b'"last_node_id"', b'"last_link_id"')
"""What a workflow of ComfyUI holds, and no caption or metadata does."""


@dataclass(frozen=True)
class Leftover:
    """What one kind of program leaves in folders: patterns of names in lower case, of files and of folders."""

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
"""The first that fits counts."""
_LEFTOVER_FILES = tuple((one.what, one.files) for one in LEFTOVERS)
_LEFTOVER_FOLDERS = tuple((one.what, one.folders) for one in LEFTOVERS)


def leftover_of(name: str) -> str | None:
    """Which program leaves a file of this name behind; None: none is known."""
    return _whose(name, _LEFTOVER_FILES)


def leftover_folder(name: str) -> str | None:
    """Which program leaves a folder of this name behind; None: none is known."""
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
    """Whose a name is, by whole names, by endings, and by what is matched: a folder may hold a million files."""
    every = [(what, one) for what, some in patterns for one in some]
    names = {one: what for what, one in every if "*" not in one}
    endings = {one[1:]: what for what, one in every if re.fullmatch(r"\*\.\w+", one)}
    others = [(what, re.compile(translate(one))) for what, one in every if one not in names and one[1:] not in endings]
    return names, endings, others


def ending_of(name: str) -> str:
    """The ending of a file name or path, in lower case with its dot; blank without one."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


@cache
def load_plugins() -> None:
    """Let Pillow know all of its formats, and those of the plugins that are installed; once in a process."""
    Image.init()
    for module, register in PLUGINS.items():
        if find_spec(module):
            plugin = import_module(module)
            if register:
                getattr(plugin, register)()


@cache
def image_endings() -> frozenset[str]:
    """The endings of the files that Pillow decodes here."""
    load_plugins()
    decoded = Image.OPEN.keys() - NOT_DECODED
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in decoded)


def format_of_ending(ending: str) -> str | None:
    """Pillow's name of the format that an ending stands for; None: it stands for none that is decoded here."""
    return Image.registered_extensions()[ending] if ending in image_endings() else None


def demuxers_of(path: Path) -> tuple[str, ...]:
    """ffmpeg's names of the containers that a file may be of, whatever its ending, and of the streams by its ending."""
    return (*CONTAINERS, *_raw_streams(ending_of(path.name)))


def raw_stream_of(path: Path) -> str | None:
    """ffmpeg's name of the stream that a file is by its ending, which no container shares; None: it may be others."""
    ending = ending_of(path.name)
    if any(ending in endings for endings in CONTAINERS.values()):
        return None
    return next(iter(_raw_streams(ending)), None)


def _raw_streams(ending: str) -> list[str]:
    return [name for name, endings in RAW_STREAMS.items() if ending in endings]


@cache
def decoded_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it decodes here, in the order in which it tries them."""
    load_plugins()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


def kind_of_name(name: str) -> Kind | None:
    """What a file is by its name; None where only its bytes tell. A GIF counts as an image, though it may be a clip."""
    return "leftover" if leftover_of(name.rpartition("/")[2]) else kind_of_ending(ending_of(name))


def kind_of_ending(ending: str) -> Kind | None:
    """The same by the ending alone, for files that a row names."""
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
    """What a file is, by its name and otherwise by its first bytes; one that cannot be opened is unknown."""
    by_name = kind_of_name(path.name)
    if by_name:
        return by_name
    head = _head(path)
    if ending_of(path.name) == ".json":
        return "leftover" if is_workflow(head) else "unknown"
    return kind_of_bytes(head, path)


def media_kind(path: Path) -> Kind:
    """What a file that a row names is, by its ending and otherwise by its first bytes."""
    return kind_of_ending(ending_of(path.name)) or kind_of_bytes(_head(path), path)


def kind_by_content(path: Path) -> tuple[Kind, str | None]:
    """What a file is by its first bytes alone, and what to do with it where nothing installed decodes it."""
    head = _head(path)
    kind = kind_of_bytes(head, path)
    return kind, CONVERSIONS[".jxl" if head.startswith(JXL_SIGNATURES) else ".heic"] if kind == "unsupported" else None


def kind_of_bytes(head: bytes, path: Path) -> Kind:
    """What the file at `path` is by its first bytes `head`, whatever its ending."""
    if is_heif(head) or head.startswith(JXL_SIGNATURES):
        return "image" if _opens(path) else "unsupported"
    boxed = head[4:8] == b"ftyp" and head[8:11] != b"avi"  # of AVIF, avif and avis
    if boxed or any(head.startswith(mark, at) for at, mark in CLIP_SIGNATURES) or is_transport_stream(head):
        return "clip"
    return "image" if _opens(path) else "unknown"


def is_heif(head: bytes) -> bool:
    """Whether a file begins as HEIC images do."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _head(path: Path) -> bytes:
    """The first bytes of a file; none of one that cannot be opened."""
    try:
        with path.open("rb") as stream:
            return stream.read(SNIFFED_BYTES)
    except OSError:
        return b""


def is_transport_stream(head: bytes) -> bool:
    """Whether a file begins as an MPEG transport stream does."""
    return any(
        len(head) > 2 * size and all(head[size - 188 + size * packet] == 0x47 for packet in (0, 1))
        for size in TRANSPORT_PACKETS
    )


def is_workflow(head: bytes) -> bool:
    """Whether a JSON file that begins so is a workflow of ComfyUI."""
    return any(mark in head for mark in WORKFLOW_MARKS)


def refused_format(path: Path) -> str | None:
    """What to do with a file whose ending stands for a format that is not decoded here; None: it may be."""
    ending = ending_of(path.name)
    return CONVERSIONS[ending] if kind_of_ending(ending) == "unsupported" else None


@cache
def _formats_with_signature() -> tuple[str, ...]:
    """Formats of Pillow that are known by their first bytes; the others would take any file for theirs."""
    load_plugins()
    return tuple(name for name, (_, accept) in Image.OPEN.items() if accept and name not in NOT_DECODED)


def _opens(path: Path) -> bool:
    """Whether Pillow knows a file by its first bytes."""
    try:
        with Image.open(path, formats=_formats_with_signature()) as image:
            return min(image.size) > 0
    except Exception:
        return False
