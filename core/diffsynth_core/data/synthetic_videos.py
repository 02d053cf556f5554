"""Five synthetic clips with captions for rehearsals: all containers and oddities of real folders, without a
download.
"""

import math
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw

from diffsynth_core.data.metadata import write_metadata
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import atomic_write

FRAME_RATE = 16
"""Frames per second."""
DRAWN = (
    ("ball.mp4", (160, 128), 25, "circle", "orange", "navy", "an orange ball flies over a dark blue ground"),
    ("lift_turned.mov", (128, 192), 21, "box", "gray", "black", "a grey lift"),
    (
        "kite.mkv",
        (176, 144),
        17,
        "diamond",
        "red",
        "lightblue",
        "a red kite circles in a light blue sky, seen from below, while the wind carries it slowly to the right",
    ),
    ("coin.webm", (144, 144), 7, "circle", "gold", "purple", "a gold coin rolls by"),
    ("lamp.gif", (192, 128), 18, "box", "white", "darkgreen", "a white lamp swings before a green wall at night"),
)
"""(file name, upright size in pixels, frames, shape, its color, the background's color, caption)"""
CODING = {
    ".mp4": ("mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p"),
    ".mov": ("mov", "-c:v", "libx264", "-pix_fmt", "yuv420p"),
    ".mkv": ("matroska", "-c:v", "libx264", "-pix_fmt", "yuv420p"),
    ".webm": ("webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"),
    ".gif": ("gif",),
}
"""Suffix -> ffmpeg container and encoding options."""


def draw_clips(folder: Path) -> Path:
    """Create the clips and their metadata.csv in a folder, unless they exist; return the folder.

    Raises:
        DiffSynthError: if ffmpeg cannot be started or the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [drawn for drawn in DRAWN if not (folder / drawn[0]).is_file()]
    with ThreadPoolExecutor(len(DRAWN)) as pool:
        list(pool.map(lambda drawn: _save(_draw(*drawn[1:6]), folder / drawn[0]), missing))
    if not (folder / "metadata.csv").is_file():
        write_metadata(folder / "metadata.csv", ("video", "prompt"), [(drawn[0], drawn[-1]) for drawn in DRAWN])
    return folder


def _draw(size: tuple[int, int], frames: int, shape: str, color: str, ground: str) -> list[Image.Image]:
    """Draw a shape that moves once across the image on a wave."""
    width, height = size
    radius = min(size) // 5
    images = []
    for number in range(frames):
        image = Image.new("RGB", size, ground)
        pen = ImageDraw.Draw(image)
        done = number / (frames - 1)
        x = radius + (width - 2 * radius) * done
        y = height / 2 + (height / 2 - radius) * math.sin(2 * math.pi * done)
        bounds = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            pen.ellipse(bounds, fill=color)
        elif shape == "box":
            pen.rectangle(bounds, fill=color)
        else:
            pen.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=color)
        images.append(image)
    return images


def _save(images: list[Image.Image], path: Path) -> None:
    """Encode a clip; a rotated one is stored as a phone writes it, with a rotation for viewers."""
    turned = "turned" in path.stem
    if turned:
        images = [image.rotate(90, expand=True) for image in images]
    note = ["-noautorotate", "-display_rotation:v", "-90"] if turned else []
    width, height = images[0].size
    form, *coding = CODING[path.suffix]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(FRAME_RATE), "-i", "-"]
    pixels = b"".join(np.asarray(image).tobytes() for image in images)
    with atomic_write(path) as temporary:
        command = [*_quiet(), *note, *source, *coding, "-threads", "1", "-fflags", "+bitexact", "-f", form]
        try:
            subprocess.run([*command, f"file:{temporary}"], input=pixels, capture_output=True, check=True)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip().splitlines()
            raise DiffSynthError(f"cannot write `{path}`: {said[-1] if said else error}") from error


def _quiet() -> list[str]:
    try:
        return [get_ffmpeg_exe(), "-nostats", "-loglevel", "error", "-y"]
    except RuntimeError as error:
        raise DiffSynthError(f"cannot start ffmpeg: {error}", "reinstall `imageio-ffmpeg`") from error
