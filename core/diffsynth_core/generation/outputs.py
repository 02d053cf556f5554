"""Images as PNG and clips as MP4, with what they were drawn from in their metadata. No torch."""

import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import atomic_write
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.hub.identity import IDENTITIES, HashCache
from diffsynth_core.planning.drawing.jobs import GenerationJob
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import Reporter

TEXT, DETAILS = "parameters", "diffsynth"
"""Text chunks of a PNG: the line that most programs read, and everything as JSON."""
CODING = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "17", "-preset", "medium", "-movflags", "+faststart")
"""How ffmpeg encodes clips: nearly without visible loss, readable everywhere."""


def parameter_text(job: GenerationJob, title: str) -> str:
    """Return the parameters of an image as AUTOMATIC1111's web UI writes them, and other programs read them."""
    negative = f"Negative prompt: {job.negative_prompt}\n" if job.negative_prompt else ""
    facts: dict[str, object] = {"Steps": job.steps, "CFG scale": f"{job.cfg_scale:g}"}
    if job.guidance is not None:
        facts["Distilled CFG Scale"] = f"{job.guidance:g}"
    facts |= {"Seed": job.seed, "Size": f"{job.width}x{job.height}"}
    if job.num_frames > 1:
        facts["Frames"] = job.num_frames
    facts["Model"] = title
    if job.adapters:
        loras = ", ".join(f"{one.lora.path.stem}: {one.weight:g}" for one in job.adapters)
        facts["Loras"] = f'"{loras}"'
    facts["Version"] = f"diffsynth {version('diffsynth-cli')}"
    return f"{job.prompt}\n{negative}{', '.join(f'{name}: {value}' for name, value in facts.items())}"


class FileFacts:
    """The files of a plan as metadata lists them: name, since images are shared, and sha256 as far as it is known.

    The files of LoRAs and images are hashed; those of components only if encoding or training did, as they are large.
    """

    def __init__(self, plan: GenerationPlan, reporter: Reporter) -> None:
        self._hashes = HashCache(plan.cache / IDENTITIES)
        small = {one.lora.path for job in plan.jobs for one in job.adapters}
        small |= {path for job in plan.jobs for paths in job.images.values() for path in paths}
        self._hashes.read_all(sorted(small), reporter, "Hashing LoRAs and images")

    def of(self, path: Path) -> dict[str, Any]:
        """Return the facts of a file."""
        return {"file": path.name, "sha256": self._hashes.known(path)}


def shared_name(origin: str) -> str:
    """Return what the files of a component were named, with absolute paths reduced to their last part: images are
    shared, and a run records where its files are on this machine.
    """
    return ", ".join(PurePath(part).name if PurePath(part).is_absolute() else part for part in origin.split(", "))


def details(job: GenerationJob, plan: GenerationPlan, files: FileFacts) -> dict[str, Any]:
    """Return everything that an image was drawn from, for JSON."""
    model: ModelPlan = plan.model
    fps = model.variant.sampling.fps
    return {
        "version": version("diffsynth-cli"),
        "family": model.facts.name,
        "model": model.variant.title,
        **job.facts,
        **({"fps": fps} if fps else {}),
        "mixed_precision": plan.machine.mixed_precision,
        "device": plan.machine.device,
        "images": {name: [files.of(path) for path in paths] for name, paths in job.images.items()},
        "loras": [
            {**files.of(one.lora.path), "weight": one.weight, "component": one.component} for one in job.adapters
        ],
        "components": {
            name: {
                "source": shared_name(found.origin),
                "storage": found.storage,
                "files": [files.of(path) for path in found.paths],
            }
            for name, found in model.components.items()
        },
    }


def save_pixels(path: Path, pixels: NDArray[np.uint8], fps: int, text: str, facts: Mapping[str, Any]) -> None:
    """Write an image or a clip, whole or not at all.

    Args:
        pixels: `[F, H, W, 3]` RGB; more than one frame are a clip.
        text, facts: the metadata, see `parameter_text` and `details`.

    Raises:
        DiffSynthError: if the file cannot be written, or ffmpeg cannot be started.
    """
    described = json.dumps(facts, ensure_ascii=False)
    if len(pixels) > 1:
        _save_clip(path, pixels, fps, f"{text}\n{described}")
    else:
        save_png(path, Image.fromarray(pixels[0]), {TEXT: text, DETAILS: described})


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks.

    Raises:
        DiffSynthError: if the disk refuses.
    """
    info = PngInfo()
    for name, text in texts.items():
        # Bytes of file names that are not UTF-8 are surrogates in Python, which no chunk can hold.
        info.add_itxt(name, text.encode("utf-8", "backslashreplace").decode())
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def _save_clip(path: Path, pixels: NDArray[np.uint8], fps: int, comment: str) -> None:
    frames, height, width = pixels.shape[:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    tagged = ["-metadata", f"comment={comment.encode('utf-8', 'backslashreplace').decode()}"]
    with atomic_write(path) as temporary:
        output = [*CODING, *tagged, "-frames:v", str(frames), "-f", "mp4", f"file:{temporary}"]
        try:
            command = [get_ffmpeg_exe(), "-nostats", "-loglevel", "error", "-y", *source, *output]
        except RuntimeError as error:
            raise DiffSynthError(f"cannot start ffmpeg: {error}", "reinstall `imageio-ffmpeg`") from error
        # In a session of its own: Ctrl-C in the terminal must not end it in the middle of a clip.
        ended = subprocess.run(
            command, input=np.ascontiguousarray(pixels).data, capture_output=True, start_new_session=True, check=False
        )
        if ended.returncode:
            said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
            reason = said[-1] if said else f"ffmpeg ended with {ended.returncode}"
            raise DiffSynthError(f"cannot write `{path}`: {reason}", "check the disk, or choose another `--out`")
