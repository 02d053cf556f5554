"""A grid as one image: a row for each prompt, a column for each variation, with labels. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffsynth_core.generation.labels import Font, LabelFont, choose_font

SMALLEST_CELL = 192
"""Narrower images are enlarged to it, by a whole factor, so that labels have room."""
LARGEST_CELL = 512
"""Wider images are reduced to it: each image is also a file of its own."""
LABEL_WIDTH = 208
"""Width of the column of prompts, in pixels."""
MARGIN = 8
"""Between cells and labels, in pixels."""
LINE_HEIGHT = 19
"""Of labels, in pixels."""
HEADING_LINES = 2
"""Maximum number of lines of a column's label."""
INK, PAPER = (24, 24, 24), (255, 255, 255)
"""Colors of text and ground."""
CUT = "…"
"""The end of a label that does not fit."""


@dataclass(frozen=True)
class CellSize:
    """Size of the images in a grid, in pixels, and how they are resized."""

    width: int
    height: int
    method: Image.Resampling


def draw_grid(
    rows: Sequence[str],
    columns: Sequence[str],
    images: Mapping[tuple[int, int], NDArray[np.uint8]],
    labels: LabelFont | None = None,
) -> Image.Image:
    """Return a grid.

    Args:
        rows, columns: labels.
        images: (row, column) -> pixels, `[H, W, 3]` RGB, of one size.
        labels: the font of the labels; None: chosen for them.
    """
    labels = labels or choose_font((*rows, *columns))
    height, width = next(iter(images.values())).shape[:2]
    cell, font = _cell_size(width, height), labels.font
    headings = [wrap_label(labels.drawable(label), cell.width, HEADING_LINES, font) for label in columns]
    top = MARGIN + LINE_HEIGHT * max(map(len, headings), default=0)
    left = LABEL_WIDTH + 2 * MARGIN
    size = (left + len(columns) * (cell.width + MARGIN), top + MARGIN + len(rows) * (cell.height + MARGIN))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        middle = left + column * (cell.width + MARGIN) + cell.width // 2
        first = top - LINE_HEIGHT * len(lines)
        for number, line in enumerate(lines):
            pen.text((middle, first + number * LINE_HEIGHT), line, INK, font, anchor="ma")
    for row, label in enumerate(rows):
        y = top + MARGIN + row * (cell.height + MARGIN)
        lines = wrap_label(labels.drawable(label), LABEL_WIDTH, cell.height // LINE_HEIGHT, font)
        for number, line in enumerate(lines):
            pen.text((MARGIN, y + number * LINE_HEIGHT), line, INK, font, anchor="la")
    for (row, column), pixels in images.items():
        image = Image.fromarray(pixels).resize((cell.width, cell.height), cell.method)
        sheet.paste(image, (left + column * (cell.width + MARGIN), top + MARGIN + row * (cell.height + MARGIN)))
    return sheet


def middle_frame(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the frame in the middle of a clip `[F, H, W, 3]`, in memory of its own."""
    return np.array(pixels[len(pixels) // 2])


def wrap_label(text: str, width: int, max_lines: int, font: Font) -> list[str]:
    """Wrap a label to `width` pixels and at most `max_lines` lines; what does not fit is cut and ends with `…`.

    Words are kept whole if they fit in a line.
    """
    left = re.sub(r"\s+", " ", text).strip()
    lines: list[str] = []
    while left and len(lines) < max_lines:
        line = left[: _fitting(left, width, font)]
        if line != left and " " in line.rstrip() and left[len(line)] != " ":
            line = line[: line.rindex(" ")]
        lines.append(line.rstrip())
        left = left[len(line) :].lstrip()
    if left and lines:
        last = lines[-1]
        lines[-1] = last[: _fitting(last, width - round(font.getlength(CUT)), font)].rstrip() + CUT
    return lines


def _fitting(text: str, width: int, font: Font) -> int:
    """Return how many characters of a text fit in a width, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _cell_size(width: int, height: int) -> CellSize:
    if width > LARGEST_CELL:
        return CellSize(LARGEST_CELL, max(1, round(height * LARGEST_CELL / width)), Image.Resampling.LANCZOS)
    factor = -(-SMALLEST_CELL // width)
    return CellSize(width * factor, height * factor, Image.Resampling.NEAREST)
