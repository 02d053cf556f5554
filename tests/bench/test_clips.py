"""Time to read a clip, relative to ffmpeg writing the same frames into a pipe."""

import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from diffsynth_core.data.videos import load_clip

FRAMES = 49
FILMED = 57
HEIGHT, WIDTH = 480, 832
ROUNDS = 5
GRAIN = 2
"""Standard deviation of camera noise, of 255; without it, H.264 has almost nothing to decode."""
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "cat", "retina")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, bench) -> list[Path]:
    """Six clips of 832 x 480 at 16 frames per second: a camera that pans over a photograph and zooms in."""
    folder = tmp_path_factory.mktemp("clips")
    return [_film(name, folder / f"{name}.mp4") for name in bench.size(PHOTOGRAPHS, PHOTOGRAPHS[:1])]


@pytest.mark.parametrize(("height", "width"), [(480, 832), (240, 416)])
def test_reading_a_clip_takes_at_most_1_3_of_ffmpeg(clips, height, width, bench):
    ours, bare = [], []
    for _ in range(bench.rounds(ROUNDS)):
        for clip in clips:
            ours.append(_seconds(load_clip, clip, 0, FRAMES, height, width, None))
            bare.append(_seconds(_read_with_ffmpeg, clip))
    ratio = statistics.median(ours) / statistics.median(bare)
    fastest = f"fastest {min(ours) / min(bare):.2f}"
    bench.at_most(f"reading a clip at {width} x {height} / ffmpeg", ratio, 1.3, fastest)


def _seconds(read, *arguments) -> float:
    started = time.perf_counter()
    read(*arguments)
    return time.perf_counter() - started


def _read_with_ffmpeg(clip: Path) -> None:
    command = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", str(clip), "-frames:v", str(FRAMES)]
    with subprocess.Popen([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE) as process:
        assert len(process.stdout.read()) == FRAMES * HEIGHT * WIDTH * 3
    assert process.returncode == 0


def _film(name: str, path: Path) -> Path:
    photograph = Image.fromarray(getattr(skimage.data, name)()[..., :3]).convert("RGB")
    scale = 1.5 * max(WIDTH / photograph.width, HEIGHT / photograph.height)
    photograph = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
    noise = np.random.default_rng(0).normal(0, GRAIN, (HEIGHT, WIDTH, 3)).round().astype(np.int16)
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}"]
    coding = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p", str(path)]
    with subprocess.Popen([*command, "-r", "16", "-i", "-", *coding], stdin=subprocess.PIPE) as process:
        for number in range(FILMED):
            wide, tall = WIDTH * (1.2 - number / 300), HEIGHT * (1.2 - number / 300)
            left, top = 3.3 * number, 1.7 * number
            view = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + wide, top + tall))
            grain = np.roll(noise, (37 * number, 91 * number), (0, 1))
            process.stdin.write((np.asarray(view) + grain).clip(0, 255).astype(np.uint8).tobytes())
        process.stdin.close()
    assert process.returncode == 0
    return path
