"""Checks of the images of prompts against the model that draws. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from diffsynth_core.data.conditions import Condition
from diffsynth_core.data.images import ImageHeader, read_image_header
from diffsynth_core.data.media import is_clip
from diffsynth_core.data.videos import read_video_header
from diffsynth_core.errors import DiffSynthError, Problem, report, suggest
from diffsynth_core.models.spec import FamilyFacts, Variant
from diffsynth_core.planning.drawing.prompts import PromptRow


class ImageChecks:
    """Checks the images of prompts against what a model takes; a file is opened once."""

    def __init__(
        self,
        facts: FamilyFacts,
        variant: Variant,
        needed: Sequence[str],
        max_pixels: int,
        way_out: Callable[[str, bool], str],
    ) -> None:
        """Check nothing yet.

        Args:
            needed: extra inputs of the run; the model may require others.
            max_pixels: of reference images.
            way_out: (extra input without images, whether the model requires it) -> hint.
        """
        self._way_out = way_out
        self._facts, self._variant, self._max_pixels = facts, variant, max_pixels
        accepted = [name for name in needed if name in variant.accepted_inputs]
        self._needed = dict.fromkeys((*accepted, *variant.required_inputs))
        self._headers: dict[Path, ImageHeader | None] = {}

    def check(self, rows: Sequence[PromptRow], images: Mapping[str, tuple[Path, ...]]) -> None:
        """Report images that the model does not take, too many, missing or unreadable ones.

        Args:
            images: extra input -> files, for the prompts that have none of their own.
        """
        found = [problem for name, paths in images.items() for problem in self._of_input(f"`--{name}`", name, paths)]
        for row in rows:
            for name, paths in row.images.items():
                found += self._of_input(f"{row.where}, `{name}`", name, paths)
        for name in self._needed:
            lacking = [row for row in rows if not (row.images.get(name) or images.get(name))]
            if rows and len(lacking) == len(rows):
                found.append(self._lacking("", name))
            else:
                found += [self._lacking(f"{row.where}: ", name) for row in lacking]
        report(*found)

    def _of_input(self, where: str, name: str, paths: Sequence[Path]) -> Iterator[Problem]:
        if name not in self._variant.accepted_inputs:
            yield _not_taken(where, name, self._variant)
            return
        conditions = [one for one in self._variant.conditions if one.column == name]
        most = 1 if name in self._facts.frame_inputs else conditions[0].max_count if conditions else None
        if most is not None and len(paths) > most:
            images = "one image" if most == 1 else f"at most {most} images"
            what = f"{where}: {self._variant.title} takes {images}, got {len(paths)}"
            yield Problem(what, f"pass {images}", wrong_use=True)
        read = _check_frame if name in self._facts.frame_inputs else read_image_header
        for path in paths:
            yield from self._of_file(where, path, conditions, read)

    def _of_file(
        self,
        where: str,
        path: Path,
        conditions: Sequence[Condition],
        read: Callable[[Path], ImageHeader | None],
    ) -> Iterator[Problem]:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            yield Problem(f"{where}: `{path}` {what}", "correct the path", wrong_use=True)
            return
        if path not in self._headers:
            try:
                self._headers[path] = read(path)
            except DiffSynthError as error:
                self._headers[path] = None
                yield Problem(f"{where}: {error.problems[0].message}", "pass another image")
            except OSError as error:
                self._headers[path] = None
                yield Problem(f"{where}: `{path}` cannot be read: {error.strerror}", "change its permissions")
        header = self._headers[path]
        for condition in conditions if header else ():
            assert header is not None
            if callable(condition.size) and not min(condition.size(header.width, header.height, self._max_pixels)):
                what = f"{where}: `{path}` is too small or too narrow as a reference image of this model"
                yield Problem(what, "pass another image")
                return

    def _lacking(self, where: str, name: str) -> Problem:
        what = f"{where}{self._variant.title} draws from `{name}`, and none is given"
        return Problem(what, self._way_out(name, name in self._variant.required_inputs), wrong_use=True)


def _check_frame(path: Path) -> None:
    """Check an image, or a clip of which a frame is taken.

    Raises:
        DiffSynthError: if it is neither, or its first frame cannot be decoded.
    """
    if is_clip(path):
        read_video_header(path)
    else:
        read_image_header(path)


def _not_taken(where: str, name: str, variant: Variant) -> Problem:
    near = suggest(name, variant.accepted_inputs)
    known = f"it takes {', '.join(variant.accepted_inputs)}" if variant.accepted_inputs else "remove it"
    meant = f"--{near}" if where.startswith("`--") else near
    hint = f"did you mean `{meant}`?" if near else known
    return Problem(f"{where}: {variant.title} does not take `{name}`", hint, wrong_use=True)
