"""Thumbnails of previews for the page of a run: few and small enough for a browser, whatever was drawn. No torch."""

import io
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffsynth_core.checkpoints.run_folder import PreviewImage
from diffsynth_core.data.images import open_image, to_rgb
from diffsynth_core.data.media import is_clip
from diffsynth_core.run_page.previews import Preview, PromptImages, by_prompt

SIDE = 320
"""Maximum length of a side of a thumbnail in pixels."""
LEAST_SIDE = 80
QUALITIES = (80, 60, 40, 20)
"""Of WebP, tried one after the other."""
MAX_BYTES = 9_000
"""Maximum size of a thumbnail."""
MAX_THUMBNAILS = 600
"""Maximum number of thumbnails in a page: with the maximum size 7.2 MB in base64."""
MAX_PROMPTS = 100
"""Maximum number of prompts that a page shows."""
FAILED = ""
"""Stands for a thumbnail that cannot be made."""


class Thumbnails:
    """The thumbnails of a run as data URIs, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Path, str], str] = {}

    def make(self, previews: Sequence[Preview]) -> tuple[list[PromptImages], dict[tuple[int, str], str]]:
        """Return the prompts that are shown, with the images that are, and (step, file) -> data URI of these."""
        shown = shown_images(by_prompt(tuple(previews)))
        folders = {preview.step: preview.folder for preview in previews}
        wanted = [
            (step, folders[step], image) for prompt in shown for step, image in prompt.images.items() if step in folders
        ]
        kept = {(folder, image.file) for _, folder, image in wanted}
        self._made = {key: data for key, data in self._made.items() if key in kept}
        for _, folder, image in wanted:
            if (folder, image.file) not in self._made:
                self._made[folder, image.file] = thumbnail(folder / image.file, image)
        return shown, {(step, image.file): self._made[folder, image.file] for step, folder, image in wanted}


def shown_images(prompts: Sequence[PromptImages]) -> list[PromptImages]:
    """Return the first prompts, with the images of every second, fourth … step if there are too many, and the last.

    So an image that is left out is not shown again later, and the first step always is.
    """
    shown = prompts[:MAX_PROMPTS]
    room = MAX_THUMBNAILS // max(1, len(shown))
    return [PromptImages(one.prompt, one.seed, _thinned(one.images, room)) for one in shown]


def _thinned(images: dict[int, PreviewImage], room: int) -> dict[int, PreviewImage]:
    steps, every = sorted(images), 1
    while len(kept := {*steps[::every], steps[-1]}) > room:
        every *= 2
    return {step: images[step] for step in steps if step in kept}


def thumbnail(path: Path, image: PreviewImage) -> str:
    """Return an image, or the first frame of a clip, as the data URI of a small WebP; `FAILED` if it cannot be read."""
    try:
        pixels = _first_frame(path, image) if is_clip(path) else to_rgb(open_image(path))
    except Exception:  # whatever a damaged file makes a decoder raise
        return FAILED
    side = SIDE
    while side >= LEAST_SIDE:
        small = pixels.copy()
        small.thumbnail((side, side))
        for quality in QUALITIES:
            stream = io.BytesIO()
            small.save(stream, "WEBP", quality=quality)
            if stream.tell() <= MAX_BYTES:
                return f"data:image/webp;base64,{b64encode(stream.getvalue()).decode()}"
        side //= 2
    return FAILED


def _first_frame(path: Path, image: PreviewImage) -> Image.Image:
    from diffsynth_core.data.videos import load_clip

    return Image.fromarray(load_clip(path, 0, 1, image.height, image.width, None)[0])
