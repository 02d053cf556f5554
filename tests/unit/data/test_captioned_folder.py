"""A folder of media with captions: each file is a sample, a caption, skipped or reported; names find their files."""

import os
import subprocess
import sys
import unicodedata

import pytest
from PIL import Image

from diffsynth_core.data.captioned_folder import sort_folder
from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.file_index import list_files
from diffsynth_core.data.formats import kind_of_file, kind_of_name, media_kind
from diffsynth_core.data.images import SizeRule, read_image_header
from diffsynth_core.data.media import MediaRule
from diffsynth_core.data.metadata import read_metadata
from diffsynth_core.data.rows import read_rows
from diffsynth_core.data.samples import build_samples
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter
from tests.naming import names

NFC, NFD = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((32, 32)).save(path, "PNG")


def text(path, content="a gradient"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def files_of(folder):
    """Return the target of each row in training, or the messages of errors."""
    rows = read_rows(read_metadata(folder, None, "prompt", "image"), Columns("prompt", "image"), "named")
    wrong = [problem.message.removeprefix(f"`{folder}`: ").replace(f"{folder}/", "") for problem in rows.problems()]
    return wrong or [cells["image"] for cells in rows.metadata.rows.values()]


def found_in(folder, depth="paths"):
    """Return (code, level, message) of all findings except the cache and buckets."""
    report, _ = validate(folder, Rules(), CheckOptions(depth, workers=1), SilentReporter())
    return [(one.code, one.level, one.message) for one in report.findings if one.code not in ("BUCKETS", "CACHE_SIZE")]


@pytest.mark.parametrize("ending", ["txt", "TXT", "Txt", "caption", "Caption", "CAPTION"])
def test_captions_of_every_spelling_are_read(tmp_path, ending):
    image(tmp_path / "a.png")
    text(tmp_path / f"a.{ending}", "\ufeff a cat\n")
    assert read_metadata(tmp_path, None, "prompt", "image").rows == {1: {"image": "a.png", "prompt": "a cat"}}
    assert [code for code, _, _ in found_in(tmp_path)] == []


def test_two_captions_of_one_image_are_named(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt")
    text(tmp_path / "a.caption")
    said = names("a.png", "2 caption files", "a.caption", "a.txt")
    assert files_of(tmp_path) == [said]
    assert found_in(tmp_path) == [("CAPTION_AMBIGUOUS", "error", said)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a cat".encode("utf-16"), names("it is UTF-16")),
        ("a cat".encode("utf-16-le"), names("looks like UTF-16")),
        ("café".encode("latin-1"), names("Windows-1252", "Latin-1")),
        (b"PK\x03\x04\x00\x08 a cat on a chair", names("binary data")),
    ],
)
def test_captions_that_are_not_utf8_say_what_they_are(tmp_path, content, reason):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", content)
    for said in (files_of(tmp_path)[0], found_in(tmp_path)[0][2]):
        assert said == names("a.txt", "not UTF-8", reason) and "(byte " in said


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("._a.jpg", "macOS"), (".DS_Store", "macOS"), ("__MACOSX/b.jpg", "macOS"), ("Icon\r", "macOS"),
        ("Thumbs.db", "Windows"), ("desktop.ini", "Windows"), ("a.jpg:Zone.Identifier", "Windows"),
        ("a.lnk", "Windows"), ("@eaDir/a.jpg", "network storage"), ("notes.ipynb", "notebooks"),
        (".ipynb_checkpoints/a-checkpoint.png", "notebooks"), ("b.jpg.crdownload", "unfinished downloads"),
        ("b.mp4.part", "unfinished downloads"), ("b.tmp", "unfinished downloads"), ("~$captions.docx", "editors"),
        ("a.txt~", "editors"), ("#a.txt#", "editors"), ("a.txt.bak", "editors"), ("z.latent", "ComfyUI"),
        ("IMG_1.AAE", "cameras"), (".hidden/b.jpg", "hidden files"), (".b.jpg", "hidden files"),
    ],
)  # fmt: skip
def test_what_systems_leave_is_passed_over_and_said(tmp_path, name, whose):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt")
    text(tmp_path / name, b"\0\5\26\7 no image")
    metadata = read_metadata(tmp_path, None, "prompt", "image")
    (note,) = metadata.notes
    assert len(metadata.rows) == 1 and note == names("1 file", "skipped", f"from {whose} (")
    assert found_in(tmp_path) == [("FILE_LEFTOVER", "info", note)]


def test_a_workflow_of_comfyui_is_passed_over_and_another_json_is_named(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt")
    text(tmp_path / "a.json", '{"3": {"inputs": {"seed": 1}, "class_type": "KSampler"}}')
    text(tmp_path / "b.json", '{"caption": "a cat"}')
    text(tmp_path / "notes.docx")
    assert read_metadata(tmp_path, None, "prompt", "image").notes == (
        names("2 files", "b.json", "notes.docx", "not read"),
        names("1 file", "skipped", 1, "ComfyUI", "a.json"),
    )


def test_images_that_nothing_installed_reads_are_named_with_a_way_out(says, tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt")
    text(tmp_path / "b.jxl", b"\xff\x0a")
    text(tmp_path / "c.dng", b"II*\0")
    (note,) = read_metadata(tmp_path, None, "prompt", "image").notes
    assert note == names("2 files", "b.jxl", "c.dng", "unsupported", "PNG or JPEG", "pillow-jxl-plugin", "PNG or JPEG")
    says(note)
    text(tmp_path / "b.txt")  # now it is meant as a sample
    said = names("b.jxl", "unsupported", "has a caption")
    assert files_of(tmp_path) == [said]
    assert ("FORMAT_UNSUPPORTED", "error", said) in found_in(tmp_path)


def test_clips_among_images_are_named(tmp_path):
    image(tmp_path / "a.png")
    for name in ("a.txt", "a.mp4", "b.ts", "b.txt"):
        text(tmp_path / name, b"G" * 1000)
    metadata = read_metadata(tmp_path, None, "prompt", "image")
    assert [row["image"] for row in metadata.rows.values()] == ["a.png"]
    assert metadata.notes == (names("2 videos", "a.mp4", "b.ts"),)


@pytest.mark.parametrize("name", ["photo", "photo.dat", "photo.jpeg_large", "photo.png_"])
def test_an_image_is_one_whatever_its_ending(tmp_path, name):
    image(tmp_path / name)
    text(tmp_path / "photo.txt")
    assert kind_of_file(tmp_path / name) == media_kind(tmp_path / name) == "image"
    assert files_of(tmp_path) == [name]
    assert read_image_header(tmp_path / name).width == 32


def test_typescript_is_no_transport_stream(tmp_path):
    text(tmp_path / "index.ts", "export const GG = 1;\n" * 50)
    assert kind_of_file(tmp_path / "index.ts") == "unknown"


def test_a_phone_photo_under_another_ending_is_told(tmp_path):
    text(tmp_path / "a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(DiffSynthError, match=r"a\.jpg` has an unsupported format") as caught:
        read_image_header(tmp_path / "a.jpg")
    assert caught.value.problems[0].hint == names("pillow-heif")
    text(tmp_path / "b.jpg", b"\0\0\0\x18ftypisom\0\0\0\0isommp41")
    with pytest.raises(DiffSynthError, match=r"b\.jpg` cannot be read as an image: it is a video"):
        read_image_header(tmp_path / "b.jpg")


def test_links_out_of_the_folder_are_named(tmp_path):
    image(tmp_path / "inside" / "a.png")
    text(tmp_path / "inside" / "a.txt")
    image(tmp_path / "outside" / "b.png")
    (tmp_path / "inside" / "more").symlink_to(tmp_path / "outside")
    (note,) = read_metadata(tmp_path / "inside", None, "prompt", "image").notes
    assert note == names("1 link", "more", "outside")
    assert [(code, level) for code, level, _ in found_in(tmp_path / "inside")] == [("PATH_OUTSIDE", "warning")]


def test_every_file_is_in_one_place(tmp_path):
    for name in ("a.png", "b.gif", "sub/c.webp"):
        image(tmp_path / name)
    for name in ("a.txt", "x.txt", "d.mp4", "e.heic", "e.txt", "f.docx", ".DS_Store", "metadata.tsv"):
        text(tmp_path / name)
    listing = list_files(tmp_path)
    folder = sort_folder(listing, "image", ("metadata.tsv",))
    leftovers = [name for names in folder.leftovers.values() for name in names]
    places = (folder.rows, folder.captions, folder.lone_captions, folder.other_media, folder.unsupported,
              folder.captioned_unsupported, folder.unknown, leftovers, folder.metadata)  # fmt: skip
    assert sorted(name for place in places for name in place) == sorted(listing.files)


def rows_of(folder, *names, separator="\n"):
    """Return the files of the rows of a metadata.csv in training, or the messages of errors."""
    (folder / "metadata.csv").write_text(
        "image,prompt\n" + "".join(f'"{name}",x{place}\n' for place, name in enumerate(names)),
        encoding="utf-8",
        newline="",
    )
    rows = read_rows(read_metadata(folder, None, "prompt", "image"), Columns("prompt", "image"), "named")
    rule, videos = MediaRule(SizeRule(None, None, 1 << 20, 16)), VideoProbeCache(folder.parent / "memory")
    found, problems = build_samples(rows, rule, videos, SilentReporter())
    problems = [*rows.problems(), *problems]
    files = [str(sample.target.path.relative_to(folder)) for sample in found.samples]
    return files or [(problem.message.replace(f"{folder}/", ""), problem.hint) for problem in problems]


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        (NFD, NFC), (NFC, NFD), (f"fotos {NFD[:5]}/{NFD}", f"fotos {NFC[:4]}/{NFC}"), ("a.png", "a.png\r"),
        ("a.png", " a.png "), ("a.png ", "a.png "), ("a.png\r", "a.png\r"), (".hidden/a.png", ".hidden/a.png"),
        ("@eaDir/a.png", "@eaDir/a.png"), ("._a.png", "._a.png"),
    ],
)  # fmt: skip
def test_a_name_that_was_listed_is_found(tmp_path, on_disk, named):
    folder = tmp_path / "set"
    image(folder / on_disk)
    assert rows_of(folder, named) == [on_disk]
    for depth in ("paths", "files"):
        assert not [one for one in found_in(folder, depth) if one[1] == "error"]


def test_names_that_differ_in_combining_characters_alone_are_told_apart(tmp_path):
    folder = tmp_path / "set"
    both = [unicodedata.normalize(form, "ệ.png") for form in ("NFC", "NFD")]
    for name in both:
        image(folder / name)
    assert rows_of(folder, *both) == both
    between = "\u1eb9\u0302.png"  # composed in a third way: which one is meant?
    assert rows_of(folder, between)[0][0] == names(between, "combining characters")
    ((code, _, said),) = [one for one in found_in(folder) if one[0].startswith("PATH")]
    assert code == "PATH_CASE" and said == names("combining characters")


def test_back_slashes_are_told(says, tmp_path):
    folder = tmp_path / "set"
    image(folder / "images" / "a.png")
    ((message, hint),) = rows_of(folder, "images\\a.png")
    says(f"{message}\n  hint: {hint}")
    assert message == names("images\\a.png", "does not exist", "`\\`") and hint == names("`/`")
    assert [one[2] for one in found_in(folder) if one[0] == "PATH_MISSING"] == [
        names("row 1", "image", "images\\a.png", "does not exist", "`\\`")
    ]


@pytest.mark.parametrize(
    ("content", "columns", "said"),
    [
        ("image,prompt,,\na.png,x,,\nb.png,y,,\n", ("image", "prompt"), []),
        ("image,,prompt\na.png,,x\n", ("image", "prompt"), []),
        ("image,prompt\na.png,x,,\n", ("image", "prompt"), []),
        (",image,prompt\n0,a.png,x\n1,b.png,y\n", ("image", "prompt"), [names("column 1", "no name", 0)]),
    ],
)  # fmt: skip
def test_columns_without_a_name(tmp_path, content, columns, said):
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    text(tmp_path / "metadata.csv", content)
    metadata = read_metadata(tmp_path, None, "prompt", "image")
    assert metadata.columns == columns and all(set(row) <= set(columns) for row in metadata.rows.values())
    unnamed = [one[2] for one in found_in(tmp_path) if one[0] == "COLUMN_UNKNOWN"]
    assert [part in metadata.notes for part in said] == [True] * len(said) == [part in unnamed for part in said]
    assert len(metadata.notes) == len(unnamed) == len(said)


def test_excel_s_unicode_text_is_told(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("image\tprompt\r\na.png\tx\r\n".encode("utf-16"))
    assert files_of(tmp_path)[0] == names("not UTF-8", "byte 3", "UTF-16", "Unicode Text", "Excel")


def test_names_alone_decide_for_what_is_common():
    assert [kind_of_name(name) for name in ("a.JPG", "b.Mp4", "c.GIF", "d.TXT", "e.heif", "f", "g.ts")] == [
        "image", "clip", "image", "caption", "unsupported", None, None,
    ]  # fmt: skip


PLUGIN = """
from PIL import Image, PngImagePlugin

class Photo(PngImagePlugin.PngImageFile):
    format = "HEIF"

def register_heif_opener():
    Image.register_open("HEIF", Photo, lambda head: head[4:8] == b"ftyp")
    Image.register_extension("HEIF", ".heic")
"""


def test_a_plugin_of_pillow_is_used_where_it_is_installed(tmp_path):
    text(tmp_path / "site" / "pillow_heif.py", PLUGIN)
    asked = "from diffsynth_core.data.formats import *; print(kind_of_name('a.heic'), kind_of_name('a.jxl'), decoded_formats()[-1])"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["image", "unsupported", "HEIF"], done.stderr
    assert kind_of_name("a.heic") == "unsupported"
