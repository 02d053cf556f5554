"""Grids: every cell in its place, labels cut where they do not fit."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from diffsynth_core.generation import labels
from diffsynth_core.generation.grid import draw_grid, middle_frame, wrap_label
from diffsynth_core.generation.labels import FONT_SIZE, LabelFont, choose_font, missing_characters

FONT = ImageFont.load_default(FONT_SIZE)
LONG = "a red circle left of a blue square on yellow, seen from above " * 9


def flat(height: int, width: int, *color: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(color), (height, width, 3))


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(64, 64, (192, 192)), (300, 100, (600, 200)), (512, 1024, (256, 512))]
)
def test_cells_stand_in_rows_and_columns(height, width, shown):
    colors = {(row, column): (80 * row, 60 * column, 200) for row in range(3) for column in range(4)}
    cells = {place: flat(height, width, *color) for place, color in colors.items()}
    sheet = np.asarray(draw_grid(["a", LONG, ""], ["", "b", "c", "d"], cells))
    for (row, column), color in colors.items():
        y, x = np.where((sheet == color).all(axis=2))
        assert (y.max() - y.min() + 1, x.max() - x.min() + 1) == shown, (row, column)
        assert len(y) == shown[0] * shown[1]
    centers = {place: np.argwhere((sheet == color).all(axis=2)).mean(axis=0) for place, color in colors.items()}
    assert all(centers[row, 0][0] == centers[row, 3][0] for row in range(3))
    assert centers[0, 0][0] < centers[1, 0][0] < centers[2, 0][0]
    assert centers[0, 0][1] < centers[0, 1][1] < centers[0, 2][1] < centers[0, 3][1]


def test_labels_are_drawn_beside_their_row_and_above_their_column():
    cells = {(row, column): flat(64, 64, 255, 255, 255) for row in range(2) for column in range(2)}
    blank = np.asarray(draw_grid(["", ""], ["", "x"], cells)).min(axis=2)
    labeled = np.asarray(draw_grid(["", "fox"], ["", "x"], cells)).min(axis=2)
    y, x = np.where(labeled != blank)
    assert y.min() > 192 and x.max() < 224, "on white, in the second row, left of the cells"
    heading = np.where(blank < 128)
    assert heading[0].max() < 30 and heading[1].min() > 224 + 192, "above the second column"


@pytest.mark.parametrize("text", ["", "short", "two  words\nand more", LONG, "x" * 300, "word " + "y" * 80 + " end"])
@pytest.mark.parametrize("width", [40, 208])
@pytest.mark.parametrize("lines", [1, 2, 10])
def test_lines_fit_and_only_what_does_not_fit_is_cut(text, width, lines):
    wrapped = wrap_label(text, width, lines, FONT)
    assert len(wrapped) <= lines
    assert all(FONT.getlength(line) <= width for line in wrapped)
    whole = " ".join(text.split())
    joined = "".join(wrapped).replace(" ", "")
    if wrapped and wrapped[-1].endswith("…"):
        assert whole.replace(" ", "").startswith(joined[:-1]) and len(wrapped) == lines
    else:
        assert joined == whole.replace(" ", "")


def test_words_stay_whole():
    assert wrap_label("a red circle left of a blue square on yellow", 208, 5, FONT) == [
        "a red circle left of a blue square", "on yellow",
    ]  # fmt: skip


def test_the_middle_frame_of_a_clip():
    clip = np.stack([flat(2, 2, number, 0, 0) for number in range(5)])
    assert (middle_frame(clip) == flat(2, 2, 2, 0, 0)).all()
    assert Image.fromarray(middle_frame(clip)).size == (2, 2)


def test_what_a_font_lacks_is_found():
    assert missing_characters(FONT, "a fox, 50 % …") == ()
    assert missing_characters(FONT, "漢字 and 漢") == ("漢", "字")


@pytest.fixture
def installed(monkeypatch):
    """Only these font files are installed; Pillow brings a font of its own."""

    def install(*names: str):
        monkeypatch.setattr(labels, "FONT_FILES", names)

    return install


def test_english_is_drawn_in_the_font_that_every_machine_has(installed):
    installed("DejaVuSans.ttf")
    assert choose_font(["a red fox", "step-8"]).font.getname() == FONT.getname()


def test_other_alphabets_are_drawn_in_an_installed_font(installed):
    try:
        ImageFont.truetype("DejaVuSans.ttf", FONT_SIZE)
    except OSError:
        pytest.skip("DejaVu Sans is not installed")
    installed("gone.ttf", "DejaVuSans.ttf")
    found = choose_font(["лиса", "é"])
    assert found.font.getname()[0] == "DejaVu Sans" and not found.missing
    cells = {(0, 0): flat(64, 64, 255, 255, 255)}
    assert (np.asarray(draw_grid(["лиса"], [""], cells)) != np.asarray(draw_grid(["жаба"], [""], cells))).any()


def test_characters_that_no_font_has_are_named_and_not_drawn_as_boxes(installed):
    installed()
    found = choose_font(["a 漢字 on 水", "x"])
    assert found.missing == ("漢", "字", "水")
    assert found.drawable("a 漢字 on 水") == "a [2 characters] on [1 character]"
    assert LabelFont(FONT).drawable("a 漢字") == "a 漢字"
    cells = {(0, 0): flat(64, 64, 255, 255, 255)}
    drawn, named = draw_grid(["a 漢字"], [""], cells), draw_grid(["a [2 characters]"], [""], cells)
    assert (np.asarray(drawn) == np.asarray(named)).all()
