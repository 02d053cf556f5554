"""Messages of `train` and `dataset validate` about real-world folders: files skipped, converted, rejected."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.icc import rgb_profile
from tests.naming import names


@pytest.fixture
def folder(dataset):
    """The photographs with captions next to them, and other files of real-world folders."""
    (dataset / "metadata.csv").unlink()
    for path in dataset.glob("*.png"):
        path.with_suffix(".caption").write_text(f"a photograph of {path.stem}")
    with Image.open(dataset / "coffee.png") as image:
        image.convert("RGB").save(dataset / "coffee.png", icc_profile=rgb_profile("Display P3"))
    with Image.open(dataset / "rocket.png") as image:
        image.convert("RGB").save(dataset / "rocket.png", icc_profile=b"torn")
    for name in ("._coffee.png", ".DS_Store", "Thumbs.db", "notes.docx", "clip.mp4", "photo.heic"):
        (dataset / name).write_bytes(b"\0\5\26\7")
    return dataset


def page_of(findings):
    """Return findings for review, without terminal line endings."""
    return "\n".join(f"{one['level']} {one['code']}: {one['message']}\n  hint: {one['hint']}" for one in findings)


def test_what_is_not_read_and_what_is_converted_is_said(cli, folder):
    planned = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", folder, "--device", "cpu", "--dry_run")
    assert planned.code == 0, planned.err
    for part in (
        "`photo.heic` has an unsupported format (convert to PNG or JPEG, or install `pillow-heif`)",
        "1 video (`clip.mp4`) is not used: training uses images",
        "1 file (`notes.docx`) is not read: not an image, clip or caption",
        "3 files and folders skipped: 2 from macOS (`.DS_Store`), 1 from Windows (`Thumbs.db`)",
        "1 of 4 images is converted to sRGB from `Display P3`",
        "the colors of 1 of 4 images are treated as sRGB (first: damaged color profile",
    ):
        assert part.replace(" ", "") in planned.out.replace("\n", "").replace(" ", ""), part


def test_validate_says_the_same(cli, folder, says):
    checked = cli("dataset", "validate", folder, "--recipe", "qwen-image-lora")
    assert checked.code == 0
    for part in ("photo.heic", "clip.mp4", "notes.docx", ".DS_Store", "Display P3", "damaged color profile"):
        assert part in " ".join(checked.out.split())
    findings = json.loads(cli("dataset", "validate", folder, "--format", "json").out)["findings"]
    says(page_of(findings), r"[\d.]+ [kMG]B")


def test_what_would_be_dropped_or_guessed_is_refused(refuse, folder, cli):
    (folder / "photo.txt").write_text("a photo")
    (folder / "coffee.txt").write_text("another caption")
    (folder / "rocket.caption").write_bytes("une fusée".encode("latin-1"))
    (folder / "chelsea.caption").unlink()
    code, problems = refuse()
    said = "\n".join(message for message, _ in problems)
    assert code == 1 and len(problems) == 4
    for part in ("photo.heic", "coffee.caption", "coffee.txt", "rocket.caption", "chelsea.png"):
        assert part in said
    findings = json.loads(cli("dataset", "validate", folder, "--format", "json").out)["findings"]
    assert len([one for one in findings if one["level"] == "error"]) == 4


def test_animations_are_refused_by_name_where_images_are_trained_on(refuse, folder):
    frames = [Image.fromarray(np.full((32, 32, 3), 20 * level, np.uint8)) for level in range(12)]
    frames[0].save(folder / "coffee.png", save_all=True, append_images=frames[1:])
    code, ((message, _),) = refuse()
    assert code == 1 and message == names(folder / "coffee.png", "animated", "12 frames")


def test_what_spreadsheets_and_macs_write_is_told_by_its_cause(refuse, dataset):
    (dataset / "images").mkdir()
    (dataset / "coffee.png").rename(dataset / "images" / "coffee.png")
    (dataset / "metadata.csv").write_text("image,prompt,,\nimages\\coffee.png,a cup,,\nrocket.png,a rocket,,\n")
    code, ((message, _),) = refuse()
    assert code == 1 and message == names("row 1", "images\\coffee.png", "`\\`")
    utf_16 = "image\tprompt\nrocket.png\ta rocket\n".encode("utf-16")
    (dataset / "metadata.csv").write_bytes(utf_16)
    code, ((excel, _),) = refuse()
    assert code == 1 and excel == names(dataset / "metadata.csv", "it is UTF-16")
