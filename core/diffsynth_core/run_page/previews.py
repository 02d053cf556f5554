"""The previews that a run has drawn, read from its folder. No torch."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from diffsynth_core.checkpoints.run_folder import PREVIEW_LIST, PREVIEWS, PreviewImage, read_preview_list

FOLDER_PREFIX = "step-"


@dataclass(frozen=True)
class Preview:
    """What was drawn after a step, in order of the prompts."""

    step: int
    folder: Path
    images: tuple[PreviewImage, ...]


@dataclass(frozen=True)
class PromptImages:
    """What was drawn from one prompt with one seed: step -> image, in order of the steps."""

    prompt: str
    seed: int
    images: dict[int, PreviewImage]


class PreviewReader:
    """Reads the lists of the previews of a run, each again only if it has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / PREVIEWS
        self._known: dict[tuple[Path, int, int], Preview | None] = {}

    def read(self) -> tuple[Preview, ...]:
        """Return the previews in order of their steps; those that are damaged or incomplete are left out."""
        try:
            folders = [path for path in self._folder.iterdir() if path.name.startswith(FOLDER_PREFIX)]
        except OSError:
            folders = []
        known = {}
        for folder in folders:
            with suppress(OSError):
                status = (folder / PREVIEW_LIST).stat()
                key = (folder, status.st_mtime_ns, status.st_size)
                known[key] = self._known[key] if key in self._known else _read_preview(folder)
        self._known = known
        return tuple(sorted(filter(None, known.values()), key=lambda preview: preview.step))


def _read_preview(folder: Path) -> Preview | None:
    """Return the images that are in the folder itself; None if there are none."""
    listed = read_preview_list(folder)
    images = tuple(image for image in listed.images if PurePath(image.file).name == image.file) if listed else ()
    return Preview(listed.step, folder, images) if listed and images else None


def by_prompt(previews: tuple[Preview, ...]) -> list[PromptImages]:
    """Return the images of each prompt, in the order of the latest preview; equal ones count as several."""
    found: dict[tuple[str, int, int], dict[int, PreviewImage]] = {}
    for preview in previews:
        seen: Counter[tuple[str, int]] = Counter()
        for image in preview.images:
            key = (image.prompt, image.seed)
            seen[key] += 1
            found.setdefault((*key, seen[key]), {})[preview.step] = image
    latest = previews[-1].step if previews else 0
    return sorted(
        (PromptImages(prompt, seed, images) for (prompt, seed, _), images in found.items()),
        key=lambda one: latest not in one.images,
    )
