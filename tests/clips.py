"""Test clips encoded with ffmpeg, whose pixels show their frame number."""

import subprocess
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

LOSSLESS = {
    "mp4": ("-c:v", "libx264rgb", "-qp", "0", "-bf", "3"),
    "mov": ("-c:v", "png"),
    "mkv": ("-c:v", "ffv1"),
    "avi": ("-c:v", "ffv1", "-pix_fmt", "bgr0"),
}
"""Containers that preserve RGB exactly."""
LOSSY = {
    "webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-crf", "10", "-b:v", "0"),
    "gif": ("-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"),
}


def ffmpeg(*arguments: object, pixels: bytes | None = None) -> None:
    """Run ffmpeg; fail with its messages."""
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    done = subprocess.run(command, input=pixels or b"", capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def write_clip(
    path: Path, frames: np.ndarray, *coding: str, before: tuple[str, ...] = (), rate: int | str = 25
) -> Path:
    """Encode frames `[F, H, W, 3]`; `before` are options of the input."""
    height, width = frames.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    coding = coding or LOSSLESS.get(path.suffix[1:]) or LOSSY[path.suffix[1:]]
    ffmpeg(*before, *source, *coding, path, pixels=np.ascontiguousarray(frames).tobytes())
    return path


def numbered(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return frames `[F, H, W, 3]` with a gray level of four times their number, and a colored mark per corner."""
    pixels = np.empty((frames, height, width, 3), np.uint8)
    pixels[:] = (4 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    pixels[:, : height // 4, : width // 4] = (255, 0, 0)
    pixels[:, : height // 4, -(width // 4) :] = (0, 255, 0)
    pixels[:, -(height // 4) :, : width // 4] = (0, 0, 255)
    return pixels


def numbers(clip: np.ndarray) -> list[int]:
    """Return the frame numbers of a clip of `numbered` frames, from the level at the center."""
    _, height, width, _ = clip.shape
    return [round(float(level) / 4) for level in clip[:, height // 2, width // 2].mean(axis=-1)]


def detailed(frames: int, height: int, width: int) -> np.ndarray:
    """Return frames `[F, H, W, 3]` of a moving photograph."""
    import skimage.data

    photograph = skimage.data.astronaut()
    return np.stack([photograph[60 + 2 * n : 60 + 2 * n + height, 100 + n : 100 + n + width] for n in range(frames)])
