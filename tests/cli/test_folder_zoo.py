"""A folder with a file of every suffix that Pillow writes and ffmpeg muxes here, and with leftovers of phones,
desktops, notebooks, browsers and ComfyUI: each is read, skipped or reported, and `validate` and `train` agree.

The snapshot lists the suffixes of the Pillow and ffmpeg versions pinned in constraints.txt.
"""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from textwrap import wrap

import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from diffsynth_core.data.captioned_folder import CaptionedFolder, expected_caption, sort_folder
from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.file_index import list_files
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import FrameRule, MediaRule, load_pixels
from diffsynth_core.data.metadata import METADATA_NAMES, UNREAD_NAMES, read_metadata
from diffsynth_core.data.rows import read_rows
from diffsynth_core.data.samples import Sample, build_samples
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter

FOREIGN = {
    "iphone/IMG_0001.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "iphone/IMG_0001.AAE": b"<plist/>",
    "android/PXL_1.dng": b"II*\0",
    "android/VID_1.mp4.part": b"ftyp",
    "camera/DSC_1.NEF": b"MM\0*",
    "camera/DSC_1.XMP": b"<x/>",
    "camera/GOPR1.THM": b"\xff\xd8",
    "camera/GOPR1.LRV": b"ftyp",
    "__MACOSX/._a.jpg": b"\0\5\26\7",
    "macos/._a.jpg": b"\0\5\26\7",
    "macos/.DS_Store": b"\0\0\0\1Bud1",
    "macos/Icon\r": b"",
    "windows/Thumbs.db": b"\xd0\xcf\x11\xe0",
    "windows/desktop.ini": b"[.ShellClassInfo]",
    "windows/a.jpg:Zone.Identifier": b"[ZoneTransfer]",
    "windows/~$captions.docx": b"x",
    "windows/a - Shortcut.lnk": b"L\0\0\0",
    "nas/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": b"\xff\xd8",
    "notebook/.ipynb_checkpoints/a-checkpoint.png": b"\x89PNG",
    "notebook/explore.ipynb": b"{}",
    "notebook/__pycache__/a.pyc": b"\0",
    "browser/a.jpg.crdownload": b"\xff\xd8",
    "browser/b.tmp": b"",
    "editor/a.txt~": b"old",
    "editor/#a.txt#": b"old",
    "editor/.a.txt.swp": b"old",
    "editor/a.txt.bak": b"old",
    "comfyui/workflow.json": b'{"last_node_id": 9, "nodes": []}',
    "comfyui/api.json": b'{"3": {"class_type": "KSampler"}}',
    "comfyui/z.latent": b"\x10\0\0\0\0\0\0\0{}",
    "trainer/a.npz": b"PK\3\4",
    "trainer/a.safetensors": b"\2\0\0\0\0\0\0\0{}",
    "office/notes.docx": b"PK\3\4",
    "office/README.md": b"# a set",
    "office/a.pdf": b"%PDF-1.7",
    "office/index.ts": b"export const a = 1;",
    "audio/a.mp3": b"ID3",
    "lone.txt": b"a caption of nothing",
    "metadata.tsv": b"image\tprompt",
}
"""Files next to media: path -> first bytes."""


def image() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def write_all_of_pillow(folder: Path) -> None:
    """Write one image of every suffix whose format Pillow writes here, and animations where supported."""
    Image.init()
    for ending, form in Image.registered_extensions().items():
        for mode in ("RGB", "L", "1", "P") if form in Image.SAVE else ():
            path = folder / f"pillow_{ending[1:]}{ending}"
            try:
                image().convert(mode).save(path, form)
                break
            except Exception:  # not this mode, or a format that another program writes
                path.unlink(missing_ok=True)
    for ending in ("webp", "png", "gif", "avif"):
        turned = [image().rotate(90 * turn) for turn in range(1, 9)]
        image().save(folder / f"animated_{ending}.{ending}", save_all=True, append_images=turned, duration=40)


def ask_ffmpeg(*arguments: str) -> str:
    """Return ffmpeg's answer to a query about itself."""
    return subprocess.run([get_ffmpeg_exe(), "-hide_banner", *arguments], capture_output=True, text=True).stdout


def muxed_endings(muxer: str) -> list[str]:
    """Return the suffixes of a muxer; none if it supports no video or no files."""
    text = ask_ffmpeg("-h", f"muxer={muxer}")
    endings = re.search(r"Common extensions: (.*)\.", text)
    return [one.strip() for one in endings[1].split(",")] if endings and "Default video codec: " in text else []


def write_all_of_ffmpeg(folder: Path) -> None:
    """Write one clip and one still of every suffix that ffmpeg muxes here with its default codec."""
    names = [
        words[1].split(",")[0] for line in ask_ffmpeg("-muxers").splitlines()[4:] if len(words := line.split()) > 1
    ]
    with ThreadPoolExecutor(4) as pool:
        endings = dict(zip(names, pool.map(muxed_endings, names), strict=True))
        jobs = [(muxer, ending) for muxer, some in endings.items() for ending in some]
        list(pool.map(lambda job: mux(folder, *job), jobs))


def mux(folder: Path, muxer: str, ending: str) -> None:
    path = folder / f"{muxer}_{ending.lower()}.{ending}"
    still = muxer == "image2"
    source = ["-f", "lavfi", "-i", f"testsrc=size=176x144:rate=25:duration={0.04 if still else 0.36}"]
    only = ["-update", "1"] if still else []
    done = subprocess.run(
        [get_ffmpeg_exe(), "-y", "-loglevel", "error", "-nostdin", *source, *only, "-threads", "1", "-f", muxer, path],
        capture_output=True,
        cwd=folder,
    )
    if done.returncode or not path.is_file() or not path.stat().st_size:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with captions for all files that are read."""
    folder = tmp_path_factory.mktemp("zoo")
    write_all_of_pillow(folder)
    write_all_of_ffmpeg(folder)
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in sort(folder, "video").rows:
        (folder / expected_caption(name)).write_text(f"a file called {name}")
    return folder


def sort(folder: Path, kind: str) -> CaptionedFolder:
    return sort_folder(list_files(folder), kind, (*METADATA_NAMES, *UNREAD_NAMES))


def fates(folder: CaptionedFolder) -> dict[str, dict[str, list[str]]]:
    """Return fate -> reason -> files."""
    return {
        "read": {"image or clip": list(folder.rows), "caption": list(folder.captions)},
        "passed over": {f"left by {whose}": list(names) for whose, names in folder.leftovers.items()},
        "named": {
            "a video, where images are trained on": list(folder.other_media),
            "not decoded here": [*folder.unsupported, *folder.captioned_unsupported],
            "a caption beside nothing": list(folder.lone_captions),
            "no image, clip or caption": list(folder.unknown),
            "called metadata, and not read": list(folder.metadata),
        },
    }


def table(folder: CaptionedFolder) -> str:
    """Return the snapshot: suffixes where all files of a suffix share a fate, otherwise names."""
    lines = []
    for fate, reasons in fates(folder).items():
        for reason, names in reasons.items():
            shown = dict.fromkeys(PurePosixPath(name).suffix or PurePosixPath(name).name for name in sorted(names))
            if fate == "passed over":
                shown = dict.fromkeys(sorted(names))
            if shown and reason != "caption":
                lines += [
                    f"{fate}: {reason}",
                    *wrap(" ".join(map(escape, shown)), 100, initial_indent="  ", subsequent_indent="  "),
                ]
    return "\n".join(lines)


def escape(name: str) -> str:
    return name.replace("\r", "\\r").replace(" ", "_")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_file_is_read_passed_over_or_named(zoo, says, kind):
    folder = sort(zoo, kind)
    placed = [name for reasons in fates(folder).values() for names in reasons.values() for name in names]
    inside = [f"{path.relative_to(zoo)}" for path in zoo.rglob("*") if path.is_file()]
    hidden = tuple(name for names in folder.leftovers.values() for name in names if name.endswith("/"))
    assert len(placed) == len(set(placed)) > 150
    assert sorted(name for name in inside if not name.startswith(hidden)) == sorted(set(placed) - set(hidden))
    print(table(folder))
    says(table(folder))


RULES = {
    "image": MediaRule(SizeRule(None, None, 1 << 20, 16)),
    "video": MediaRule(SizeRule(None, None, 1 << 20, 16), FrameRule(9, 4, None, "first", 0)),
}


@pytest.mark.parametrize("kind", RULES)
def test_training_and_validate_read_the_same_files_and_say_the_same(zoo, tmp_path, says, kind):
    """Files with the suffix of an image or clip are decoded or rejected by name, such as animations among images."""
    column = "image" if kind == "image" else "video"
    metadata = read_metadata(zoo, None, "prompt", column, kind)
    columns = Columns("prompt", column)
    rows, videos = read_rows(metadata, columns, "named"), VideoProbeCache(tmp_path / "memory")
    samples, problems = build_samples(rows, RULES[kind], videos, SilentReporter())
    problems = [*rows.problems(), *problems]
    rules = Rules(columns=columns, media=RULES[kind])
    report, dataset = validate(zoo, rules, CheckOptions("files", workers=2), SilentReporter())
    assert [record.files[column][0] for record in dataset.rows.records] == [
        row[column] for row in metadata.rows.values()
    ]
    names = {number: row[column] for number, row in metadata.rows.items()}
    refused = set(names.values()) - {str(sample.target.path.relative_to(zoo)) for sample in samples.samples}
    undecoded = {
        sample.target.path.name for sample in samples.samples if not sample.target.video and not decodes(sample)
    }
    assert undecoded <= {"image2_sgi.sgi"}, "which Pillow reads in part, and which only decoding tells"
    assert {names[one.row] for one in report.findings if one.level == "error"} == refused | undecoded
    animated = {f"animated_{ending}.{ending}" for ending in ("webp", "png", "gif", "avif")}
    assert animated <= refused if kind == "image" else not animated & refused
    assert len(problems) == len(refused) and len(samples.samples) > 60
    frames = {sample.target.path.name: sample.frames for sample in samples.samples}
    assert kind == "image" or {frames[name] for name in animated} == {9}
    says("\n".join(problem.message.replace(metadata.origin, "") for problem in problems), "0x[0-9a-f]+")
    (passed_over,) = [one.message for one in report.findings if one.code == "FILE_LEFTOVER"]
    assert passed_over in metadata.notes and any("metadata.tsv" in note for note in metadata.notes)


def decodes(sample: Sample) -> bool:
    try:
        return load_pixels(sample.target).size > 0
    except DiffSynthError:
        return False


def test_the_commands_say_it(zoo, cli, says):
    """`train` and `dataset validate` name the same files; neither drops a file silently."""
    outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", zoo, "--dry_run", "--device", "cpu")
    assert outcome.code == 1
    refused = set(re.findall(r"`[^`]*/([^`/]+)` is animated", outcome.err))
    assert {"animated_webp.webp", "animated_png.png", "animated_gif.gif", "animated_avif.avif"} <= refused
    findings = json.loads(cli("dataset", "validate", zoo, "--format", "json", "--depth", "paths").out)["findings"]
    assert "iphone/IMG_0001.HEIC" in {one["path"] for one in findings if one["code"] == "FORMAT_UNSUPPORTED"}
    said = " ".join(one["message"] for one in findings)
    assert "office/README.md" in said and "macos/.DS_Store" in said and "lone.txt" in said
    says("\n".join(f"{one['level']} {one['code']}: {one['message']}" for one in findings))
