"""Faults of images and videos to plant in a dataset, each with exactly the findings that it must cause.

A plant modifies a `Draft` and returns the expected findings as (code, row, path).
"""

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from tests.clips import write_clip
from tests.icc import rgb_profile
from tests.validation_corpus import FRAME_RATE, H264, Draft

Expected = set[tuple[str, int | None, str | None]]
Plant = Callable[[Draft], Expected]


def image(code: str, name: str, save: Callable[[Image.Image, Path], object], *also: str) -> Plant:
    """An image written by `save`, with these findings."""

    def plant(draft: Draft) -> Expected:
        save(draft.photograph(), draft.folder / name)
        row = draft.row(name)
        return {(each, row, name) for each in (code, *also)}

    return plant


def begun(form: str, share: float, **options: Any) -> Callable[[Image.Image, Path], None]:
    """Write the beginning of an image file."""

    def save(one: Image.Image, path: Path) -> None:
        one.save(path, form, **options)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return save


def bomb(one: Image.Image, path: Path) -> None:
    """A PNG of a few bytes that claims 30000 x 30000 pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    coded = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))


def turned(orientation: int) -> Callable[[Image.Image, Path], None]:
    """Write an image with an EXIF orientation."""

    def save(one: Image.Image, path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        one.save(path, exif=exif)

    return save


def see_through(one: Image.Image, path: Path) -> None:
    one.putalpha(Image.linear_gradient("L").resize(one.size))
    one.save(path)


def one_clear_color(one: Image.Image, path: Path) -> None:
    one.quantize(32).save(path, transparency=3)


def animated(one: Image.Image, path: Path) -> None:
    frames = [one.rotate(angle) for angle in (0, 2, 4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def sixteen_bits(one: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(one.convert("L")).astype(np.uint16) * 257).save(path)


def like_another(code: str, name: str, save: Callable[[Image.Image, Path], object]) -> Plant:
    """An image derived from an existing one."""

    def plant(draft: Draft) -> Expected:
        _, other = draft.sound_row()
        with Image.open(draft.folder / other) as one:
            save(one.convert("RGB"), draft.folder / name)
        return {(code, draft.row(name), name)}

    return plant


IMAGES: Mapping[str, Plant] = {
    "half a JPEG": image("IMAGE_TRUNCATED", "half.jpg", begun("JPEG", 0.5)),
    "a JPEG without its last bytes": image("IMAGE_TRUNCATED", "almost.jpg", begun("JPEG", 0.98)),
    "half a progressive JPEG": image("IMAGE_TRUNCATED", "progressive.jpg", begun("JPEG", 0.6, progressive=True)),
    "half a PNG": image("IMAGE_TRUNCATED", "half.png", begun("PNG", 0.5)),
    "a tenth of a PNG": image("IMAGE_TRUNCATED", "tenth.png", begun("PNG", 0.1)),
    "half a WebP": image("IMAGE_TRUNCATED", "half.webp", begun("WEBP", 0.5)),
    "half a BMP": image("IMAGE_TRUNCATED", "half.bmp", begun("BMP", 0.5)),
    "half a TIFF": image("IMAGE_TRUNCATED", "half.tif", begun("TIFF", 0.5, compression="tiff_lzw")),
    "a text": image("IMAGE_UNREADABLE", "text.jpg", lambda one, path: path.write_text("once upon a time\n" * 20)),
    "a page that says 404": image("IMAGE_UNREADABLE", "page.png", lambda one, path: path.write_text("<html>404")),
    "an empty file": image("IMAGE_UNREADABLE", "empty.jpg", lambda one, path: path.write_bytes(b"")),
    "a JPEG called PNG": image("IMAGE_TYPE_MISMATCH", "jpeg.png", lambda one, path: one.save(path, "JPEG")),
    "a PNG called JPEG": image("IMAGE_TYPE_MISMATCH", "png.jpg", lambda one, path: one.save(path, "PNG")),
    "a WebP called JPEG": image("IMAGE_TYPE_MISMATCH", "webp.jpeg", lambda one, path: one.save(path, "WEBP")),
    "a bomb": image("IMAGE_BOMB", "bomb.png", bomb),
    "a narrow strip": image("IMAGE_TOO_SMALL", "strip.png", lambda one, path: one.resize((15, 40)).save(path)),
    "one pixel": image("IMAGE_TOO_SMALL", "one.png", lambda one, path: one.resize((1, 1)).save(path), "IMAGE_BLANK"),
    "a panorama": image("IMAGE_ASPECT", "wide.jpg", lambda one, path: one.resize((800, 160)).save(path)),
    "a banner": image("IMAGE_ASPECT", "high.png", lambda one, path: one.resize((64, 272)).save(path)),
    "an icon": image("IMAGE_CROP_LOSS", "icon.png", lambda one, path: one.resize((31, 63)).save(path)),
    "an image on its head": image("IMAGE_EXIF_ROTATED", "head.jpg", turned(3)),
    "an image on its right": image("IMAGE_EXIF_ROTATED", "right.jpg", turned(6)),
    "an image on its left": image("IMAGE_EXIF_ROTATED", "left.webp", turned(8)),
    "a mirrored image": image("IMAGE_EXIF_ROTATED", "mirrored.png", turned(2)),
    "a see-through PNG": image("IMAGE_ALPHA", "glass.png", see_through),
    "a see-through WebP": image("IMAGE_ALPHA", "glass.webp", see_through),
    "a palette with a clear color": image("IMAGE_ALPHA", "palette.png", one_clear_color),
    "CMYK": image("IMAGE_MODE", "print.jpg", lambda one, path: one.convert("CMYK").save(path)),
    "16 bits": image("IMAGE_MODE", "depth.png", sixteen_bits),
    "LAB": image("IMAGE_COLOURS", "lab.tif", lambda one, path: one.convert("LAB").save(path)),
    "Display P3": image("IMAGE_COLOURS", "p3.jpg", lambda one, path: one.save(path, icc_profile=rgb_profile("Display P3"))),
    "a damaged profile": image("IMAGE_COLOURS", "odd.png", lambda one, path: one.save(path, icc_profile=b"none")),
    "pages": image("IMAGE_ANIMATED", "pages.tif", lambda one, path: one.save(path, save_all=True, append_images=[one])),
    "an ending that says nothing": image("IMAGE_COLOURS", "IMG_0001", lambda one, path: one.save(path, "PNG", icc_profile=rgb_profile("Display P3"))),
    "JPEG XL": image("FORMAT_UNSUPPORTED", "phone.jxl", lambda one, path: path.write_bytes(b"\xff\x0a jxl")),
    "white": image("IMAGE_BLANK", "white.png", lambda one, path: Image.new("RGB", (128, 96), "white").save(path)),
    "black": image("IMAGE_BLANK", "black.jpg", lambda one, path: Image.new("RGB", (144, 96)).save(path)),
    "the same pixels": like_another("IMAGE_DUPLICATE", "same.bmp", lambda one, path: one.save(path)),
    "the same, compressed": like_another("IMAGE_NEAR_DUPLICATE", "again.jpg", lambda one, path: one.save(path, quality=60)),
    "the same, scaled": like_another(
        "IMAGE_NEAR_DUPLICATE", "scaled.png", lambda one, path: one.resize((one.width * 2, one.height * 2)).save(path)
    ),
    "the same, a little brighter": like_another(
        "IMAGE_NEAR_DUPLICATE", "bright.png", lambda one, path: ImageEnhance.Brightness(one).enhance(1.03).save(path)
    ),
}  # fmt: skip
"""Faults of target images."""
ANIMATIONS: Mapping[str, Plant] = {
    f"an animated {name}": image("IMAGE_ANIMATED", f"moves.{name.lower()}", animated) for name in ("WebP", "PNG", "GIF")
}
"""Faults of animations among images; among clips they are clips."""


def video(code: str, name: str, *coding: str, frames: int | None = None, rate: int = FRAME_RATE) -> Plant:
    """A clip encoded with these options."""

    def plant(draft: Draft) -> Expected:
        write_clip(draft.folder / name, draft.frames(frames or 40), *H264, *coding, rate=rate)
        return {(code, draft.row(name), name)}

    return plant


def half_a_video(name: str, *coding: str) -> Plant:
    def plant(draft: Draft) -> Expected:
        path = write_clip(draft.folder / name, draft.frames(), *H264, *coding, rate=FRAME_RATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        return {("VIDEO_TRUNCATED", draft.row(name), name)}

    return plant


def broken_video(draft: Draft) -> Expected:
    path = write_clip(draft.folder / "broken.mkv", draft.frames(), *H264, rate=FRAME_RATE)
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place : place + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(content)
    return {("VIDEO_UNREADABLE", draft.row("broken.mkv"), "broken.mkv")}


def no_video(draft: Draft) -> Expected:
    (draft.folder / "text.mp4").write_text("once upon a time\n" * 50)
    return {("VIDEO_UNREADABLE", draft.row("text.mp4"), "text.mp4")}


def still(draft: Draft) -> Expected:
    write_clip(draft.folder / "still.mp4", np.repeat(draft.frames(1), 40, axis=0), *H264, rate=FRAME_RATE)
    return {("VIDEO_STILL", draft.row("still.mp4"), "still.mp4")}


def turned_video(draft: Draft) -> Expected:
    before = ("-noautorotate", "-display_rotation:v", "-90")
    write_clip(draft.folder / "turned.mov", draft.frames(), *H264, before=before, rate=FRAME_RATE)
    return {("VIDEO_ROTATED", draft.row("turned.mov"), "turned.mov")}


VIDEOS: Mapping[str, Plant] = {
    "a text called MP4": no_video,
    "broken bytes": broken_video,
    "an MP4 without its end": half_a_video("half.mp4", "-movflags", "+faststart"),
    "an MP4 without its index": half_a_video("no_index.mp4"),
    "an MKV without its end": half_a_video("half.mkv"),
    "one frame": video("VIDEO_TOO_SHORT", "one.mp4", frames=1),
    "another speed": video("VIDEO_FPS", "fast.mp4", rate=30),
    "frames at uneven times": video(
        "VIDEO_VARIABLE_RATE", "uneven.mkv", "-vf", "setpts='4*N+2*mod(N,2)'", "-fps_mode", "passthrough", rate=64
    ),
    "nothing moves": still,
    "a turned clip": turned_video,
}  # fmt: skip
"""Faults of clips, whatever the target."""

CLIPS_OF_A_RECIPE: Mapping[str, Plant] = {
    "too few frames": video("VIDEO_TOO_SHORT", "short.mp4", frames=61),
    "frames that are not used": video("VIDEO_FRAMES", "long.mp4", frames=84),
}
"""Faults of clips for a recipe with 81 frames."""


def pair(code: str, column: str, save: Callable[[Image.Image, Path], object]) -> Plant:
    """An image in `column`, derived by `save` from the target."""

    def plant(draft: Draft) -> Expected:
        row, name = draft.sound_row()
        shown = f"shown_{row}.png"
        with Image.open(draft.folder / name) as one:
            save(one.convert("RGB"), draft.folder / shown)
        cells = draft.rows[-1]
        assert isinstance(cells, dict)
        cells[column] = shown
        return {(code, row, shown)}

    return plant


EDITS: Mapping[str, Plant] = {
    "nothing to show": lambda draft: {("PAIR_MISSING", draft.sound_row(edit_image="")[0], None)},
    "the image itself is shown": pair("PAIR_IDENTICAL", "edit_image", lambda one, path: one.save(path)),
    "half an image is shown": pair("IMAGE_TRUNCATED", "edit_image", begun("PNG", 0.5)),
    "a missing image is shown": lambda draft: {("PATH_MISSING", draft.sound_row(edit_image="gone.png")[0], "gone.png")},
}
"""Faults of a column `edit_image`."""


def two_shown(draft: Draft) -> Expected:
    names = []
    for place in range(2):
        names.append(f"control_{place}.png")
        draft.photograph().save(draft.folder / names[-1])
    return {("PAIR_COUNT", draft.sound_row(edit_image=json.dumps(names))[0], None)}


EDITS_OF_A_RECIPE: Mapping[str, Plant] = {"two are shown where the model takes one": two_shown}


def thumbnail(code: str) -> Plant:
    """An image of 64 x 48 pixels among images of about 160 x 160."""

    def plant(draft: Draft) -> Expected:
        draft.photograph((64, 48)).save(draft.folder / "thumbnail.png")
        return {(code, draft.row("thumbnail.png"), "thumbnail.png")}

    return plant


SIZES: Mapping[str, tuple[dict[str, int], Plant]] = {
    "a thumbnail at a fixed size": ({"height": 160, "width": 160}, thumbnail("IMAGE_UPSCALED")),
    "a thumbnail at its own size": ({"max_pixels": 160 * 160}, thumbnail("IMAGE_LOW_RESOLUTION")),
}
"""Parameters of the run -> an image that is too small for them."""
OVERLAYS: Mapping[str, Plant] = {
    "another shape": pair(
        "PAIR_ASPECT", "controlnet_image", lambda one, path: one.resize((one.width, one.height * 3 // 4)).save(path)
    ),
}
"""Faults of a column `controlnet_image`."""
MASKS: Mapping[str, Plant] = {
    "a black mask": pair("MASK_EMPTY", "mask", lambda one, path: Image.new("L", one.size).save(path)),
    "a white mask": pair("MASK_EMPTY", "mask", lambda one, path: Image.new("L", one.size, 255).save(path)),
    "a mask of another size": pair(
        "MASK_SIZE", "mask", lambda one, path: one.resize((one.width // 2, one.height // 2)).save(path)
    ),
}
"""Faults of a column `mask`."""
