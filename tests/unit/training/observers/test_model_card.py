"""The sheet of previews beside a model card."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffsynth_core.checkpoints.run_folder import PreviewImage, PreviewList, preview_folder
from diffsynth_core.training.observers.model_card import preview_sheet


def write_previews(run: Path, step: int, count: int, color: str, *more: str) -> None:
    folder, notes = preview_folder(run, step), PngInfo()
    folder.mkdir(parents=True)
    notes.add_text("parameters", "a path of bob")
    listed = PreviewImage("", "a cat", 0, 400, 800, 1)
    images = [replace(listed, file=f"000{number}.png") for number in range(1, count + 1)]
    for image in images:
        Image.new("RGB", (800, 400), color).save(folder / image.file, pnginfo=notes)
    PreviewList(step, (*images, *(replace(listed, file=name) for name in more))).save(folder)


def test_the_latest_previews_are_side_by_side_without_their_metadata(tmp_path):
    write_previews(tmp_path, 2, 1, "blue")
    write_previews(tmp_path, 10, 5, "red", "../../secret.png", "0006.mp4", "0007.png")
    (tmp_path / "samples/step-12").mkdir()  # not complete
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    content = preview_sheet(tmp_path)
    with Image.open(BytesIO(content)) as sheet:
        assert sheet.size == (4 * 384, 2 * 192)
        red, green, blue = sheet.getpixel((10, 10))
        assert red > 200 and green < 50 and blue < 50
    assert b"bob" not in content


def test_no_previews_no_sheet(tmp_path):
    write_previews(tmp_path, 2, 0, "red", "0001.mp4")
    assert preview_sheet(tmp_path) is None
