"""From rows to samples: files found, captions unchanged, sizes determined, and all faulty rows reported together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data import samples
from diffsynth_core.data.columns import check_columns
from diffsynth_core.data.conditions import Columns, Condition
from diffsynth_core.data.images import EXIF_ORIENTATION, SizeRule
from diffsynth_core.data.media import MediaCrop, MediaRule
from diffsynth_core.data.metadata import Metadata
from diffsynth_core.data.rows import read_rows
from diffsynth_core.data.samples import Sample, build_samples
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.planning.output.folder import dataset_fingerprint
from diffsynth_core.progress import SilentReporter
from tests.naming import names

RULE = SizeRule(None, None, 64 * 64, 16)


def build(folder, *rows, rule=RULE, conditions=()):
    names = tuple(dict.fromkeys(column for row in rows for column in row))
    metadata = Metadata("metadata.csv", folder, names, dict(enumerate(rows, start=1)))
    read = read_rows(metadata, Columns("prompt", "image", conditions), "named")
    found, problems = build_samples(read, MediaRule(rule), VideoProbeCache(folder / "frames"), SilentReporter())
    return found, [*read.problems(), *problems]


def row(image="a.png", prompt="x"):
    return {"image": image, "prompt": prompt}


@pytest.fixture
def folder(tmp_path):
    """A dataset folder with `a.png` of 48 x 32 pixels and a few unusual names."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "[1] cat.png", "[draft.png", '["b"].png', "sub/ü, b.png"):
        Image.new("RGB", (48, 32)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("a.png", "a.png"),
        (" a.png ", "a.png"),
        ('["a.png"]', "a.png"),
        (' [ "a.png" ] ', "a.png"),
        (["a.png"], "a.png"),
        ("[1] cat.png", "[1] cat.png"),
        ("[draft.png", "[draft.png"),
        ('["b"].png', '["b"].png'),
        ("sub/ü, b.png", "sub/ü, b.png"),
        ("./sub/../a.png", "a.png"),
    ],
)
def test_a_cell_names_one_file(folder, cell, name):
    found, problems = build(folder, row(cell))
    assert problems == []
    (sample,) = found.samples
    assert sample.target.path.resolve() == (folder / name).resolve()
    assert sample.shape == ((1, 32, 48),)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (None, names("image", "is empty")),
        ("", names("image", "is empty")),
        ("  ", names("image", "is empty")),
        ("[]", names("image", "is empty")),
        ('["a.png", "[draft.png"]', names("image", "2 files", "expected 1")),
        ("[3]", names("image", "[3]", "a path")),
        (3, names("image", 3, "a path")),
        (float("nan"), names("image", "is empty")),
        ([["a.png"]], names("image", '[["a.png"]]', "a path")),
        ({"path": "a.png"}, names("image", '{{"path": "a.png"}}', "a path")),
        ("gone.png", names("image", "gone.png", "does not exist")),
        ("sub", names("image", "sub", "does not exist")),
        ("A.PNG", names("image", "A.PNG", "a.png")),
        ("/tmp/a.png", names("image", "/tmp/a.png", "absolute")),
        ("../a.png", names("image", "../a.png", "outside")),
        ("https://a.b/c.png", names("image", "https://a.b/c.png", "URL")),
    ],
)
def test_a_cell_without_one_file_is_told_with_its_row(says, folder, cell, expected):
    found, problems = build(folder, row(), row(cell))
    assert [sample.row for sample in found.samples] == [1]
    (problem,) = problems
    says(problems)
    assert problem.message == names("metadata.csv", "row 2", expected.format(folder=folder))
    assert problem.hint and not problem.wrong_use


@pytest.mark.parametrize(("value", "caption"), [("", ""), (None, ""), (" a\nb ", " a\nb ")])
def test_captions_stay_as_they_stand(folder, value, caption):
    found, problems = build(folder, row(prompt=value))
    assert problems == []
    assert found.samples[0].caption == caption


@pytest.mark.parametrize("value", [3, 1.5, True, ["a"], {"a": 1}])
def test_a_caption_that_is_no_text_is_told(says, folder, value):
    _, problems = build(folder, row(prompt=value))
    says(problems)
    assert [problem.message for problem in problems] == [
        names("metadata.csv", "row 1", "prompt", json.dumps(value), "a string")
    ]


def test_half_a_character_in_a_caption_is_told(folder):
    half = json.loads('"a smile \\ud83d"')  # what cutting a text in the middle of an emoji leaves in JSON
    found, problems = build(folder, row(prompt=half))
    assert found.samples == ()
    assert [problem.message for problem in problems] == [
        "`metadata.csv` row 1: the caption contains an unpaired surrogate (U+D83D)"
    ]


def test_every_faulty_row_is_told_at_once_and_the_others_stay(says, folder):
    (folder / "text.png").write_text("no image")
    rows = [row("gone.png"), row(), row("text.png"), row(prompt=3), row("[1] cat.png")]
    found, problems = build(folder, *rows)
    assert [sample.row for sample in found.samples] == [2, 5]
    assert sorted(int(problem.message.split("row ")[1].split(":")[0]) for problem in problems) == [1, 3, 4]
    says(problems)
    assert any(problem.message == names("row 3", folder / "text.png", "cannot be read") for problem in problems)


@pytest.mark.parametrize("size", [(15, 400), (400, 15), (8, 8)])
def test_an_image_smaller_than_a_patch_is_told(folder, size):
    Image.new("RGB", size).save(folder / "small.png")
    found, problems = build(folder, row("small.png"))
    assert found.samples == ()
    assert f"is {size[0]} x {size[1]} pixels" in problems[0].message
    fixed = SizeRule(64, 64, 1, 16)
    assert build(folder, row("small.png"), rule=fixed)[0].samples == ()


def test_an_image_that_scaling_makes_too_thin_is_told(folder):
    Image.new("RGB", (1000, 20)).save(folder / "thin.png")
    found, problems = build(folder, row("thin.png"))
    assert found.samples == ()
    assert problems[0].message == names("1000 x 20 pixels", "max_pixels", 4096, "minimum of 16")


def test_sizes_are_those_of_the_upright_image_and_notes_say_what_is_done(says, folder):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (48, 32)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (48, 32)).save(folder / "clear.png")
    found, problems = build(folder, row("turned.jpg"), row("clear.png"), row())
    assert problems == []
    assert [sample.target.shape for sample in found.samples] == [(1, 48, 32), (1, 32, 48), (1, 32, 48)]
    assert found.notes == (names("EXIF orientation", "1 of 3"), names("1 of 3", "transparency"))
    says("\n".join(found.notes))


def test_order_and_rows_stay_with_many_images(folder):
    for number in range(40):
        Image.new("RGB", (16 + 16 * (number % 4), 16)).save(folder / f"{number}.png")
    found, _ = build(folder, *(row(f"{number}.png", str(number)) for number in range(40)))
    assert [sample.caption for sample in found.samples] == [str(number) for number in range(40)]
    assert [sample.target.width for sample in found.samples] == [16 + 16 * (number % 4) for number in range(40)]


def test_a_sample_is_named_by_row_and_file(tmp_path):
    assert Sample(7, "x", MediaCrop(tmp_path / "a.png", 16, 16)).name == names("row 7", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("columns", "messages", "hints"),
    [
        (("image", "prompt"), [], []),
        (("images", "prompt"), [names("no column", "image", "images", "prompt")], [names("rename", "images")]),
        (("x", "y"), [names("no column", "image"), names("no column", "prompt")], ["add the column", "add the column"]),
    ],
)
def test_columns_are_checked(says, columns, messages, hints):
    metadata = Metadata("m.csv", Path(), columns, {})
    problems = [one for one in check_columns(metadata, Columns("prompt", "image"), {}) if one.level == "error"]
    assert len(problems) == len(messages)
    if problems:  # nothing is kept of an empty page
        says(problems)
    for problem, message, hint in zip(problems, messages, hints, strict=True):
        assert problem.message == message
        assert problem.hint == hint


def halved(width, height, max_pixels):
    """A size rule for references that records its arguments."""
    return height // 2, min(width // 2, max_pixels)


def narrow(width, height, max_pixels):
    return height // 2, 5


ONE = Condition("shown", "edit_image", halved, max_count=1)
ANY = Condition("shown", "edit_image", halved, factor=8)
SMALL = Condition("shown small", "edit_image", narrow)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("a.png", ["a.png"]),
        ('["a.png"]', ["a.png"]),
        ('["a.png", "sub/ü, b.png"]', ["a.png", "sub/ü, b.png"]),
        (["[1] cat.png", "a.png", "a.png"], ["[1] cat.png", "a.png", "a.png"]),
    ],
)
def test_references_are_one_or_a_list(folder, cell, names):
    found, problems = build(folder, {**row(), "edit_image": cell}, conditions=(ANY, SMALL))
    assert problems == []
    (sample,) = found.samples
    assert sample.conditions == {
        "shown": tuple(MediaCrop(folder / name, 16, 24, scaled=(16, 24)) for name in names),
        "shown small": tuple(MediaCrop(folder / name, 16, 5, scaled=(16, 5)) for name in names),
    }
    assert sample.shape == ((1, 32, 48), *[(1, 16, 24)] * len(names), *[(1, 16, 5)] * len(names))
    assert set(sample.files) == {folder / name for name in ("a.png", *names)}


@pytest.mark.parametrize(
    ("cell", "rule", "expected"),
    [
        ('["a.png", "a.png"]', ONE, names("2 files", "expected 1")),
        ('["a.png", "a.png", "a.png"]', replace(ANY, max_count=2), names("3 files", "expected 2")),
        ("[]", ANY, names("is empty")),
        ("", ANY, names("is empty")),
        ('["a.png", ""]', ANY, names("is empty")),
        ('["a.png", "gone.png"]', ANY, names("gone.png", "does not exist")),
        ("a.png", replace(ANY, size=lambda *_: (0, 16)), names("{folder}/a.png", "too small or too narrow")),
    ],
)
def test_faulty_references_are_told_with_their_row(says, folder, cell, rule, expected):
    found, (problem,) = build(folder, {**row(), "edit_image": cell}, conditions=(rule,))
    assert found.samples == ()
    says([problem])
    assert problem.message == names("metadata.csv", "row 1", "edit_image", expected.format(folder=folder))
    assert problem.hint


def test_a_reference_that_is_no_image_is_told(says, folder):
    (folder / "text.png").write_text("not an image")
    found, (problem,) = build(folder, {**row(), "edit_image": '["a.png", "text.png"]'}, conditions=(ANY,))
    assert found.samples == ()
    assert problem.message == names("metadata.csv", "row 1", folder / "text.png", "cannot be read")
    says([problem])


def test_how_references_are_turned_is_told(says, folder):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (48, 32)).save(folder / "turned.jpg", exif=exif)
    found, _ = build(folder, {**row(), "edit_image": "turned.jpg"}, conditions=(ANY,))
    says("\n".join(found.notes))
    assert found.notes == (names("EXIF orientation", "1 of 2"),)
    assert found.samples[0].conditions["shown"][0].shape == (1, 24, 16)


def test_files_are_looked_for_in_a_listing_of_their_folder_and_asked_for_once(folder, monkeypatch):
    """On a network disk each access takes a millisecond, and 200 000 rows have many."""
    asked: list[str] = []

    def counted(ask):
        return lambda path, **options: (asked.append(path.name), ask(path, **options))[1]

    references = tuple(Condition(name, "shown", halved) for name in ("large", "small"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_file", counted(Path.is_file))
        found, problems = build(folder, {**row(), "shown": "[draft.png"}, conditions=references)
    assert problems == [] and found.samples[0].conditions.keys() == {"large", "small"}
    assert asked == []
    monkeypatch.setattr(Path, "stat", counted(Path.stat))
    fingerprint = dataset_fingerprint(Parameters(dataset_base_path=folder), found)
    assert sorted(asked) == ["[draft.png", "a.png"]
    (folder / "[draft.png").write_bytes((folder / "[draft.png").read_bytes() + b" ")
    assert dataset_fingerprint(Parameters(dataset_base_path=folder), found) != fingerprint, "each run asks again"


def test_the_column_of_references_is_asked_for():
    metadata = Metadata("m.csv", Path(), ("image", "prompt", "edit_images"), {})
    problems = check_columns(metadata, Columns("prompt", "image", (ANY,)), {})
    assert [(problem.message, problem.hint) for problem in problems] == [
        (names("m.csv", "no column", "edit_image", "image", "prompt", "edit_images"), names("rename", "edit_images"))
    ]


def test_an_image_to_follow_has_the_size_of_what_is_trained_on(says, folder):
    """One of another aspect ratio is cropped, which is reported once; small differences are not."""
    Image.new("RGB", (32, 48)).save(folder / "upright.png")
    Image.new("RGB", (481, 320)).save(folder / "large.png")
    over = replace(ONE, size="target")
    rows = [{**row(), "edit_image": name} for name in ("upright.png", "large.png", "a.png")]
    found, problems = build(folder, *rows, conditions=(over,))
    assert problems == []
    assert [sample.conditions["shown"][0] for sample in found.samples] == [
        MediaCrop(folder / name, 32, 48) for name in ("upright.png", "large.png", "a.png")
    ]
    (note,) = found.notes
    says(note)
    assert note == names("1 of 3", "edit_image", "aspect ratio")
    assert build(folder, *rows, conditions=(ONE,))[0].notes == ()


def test_an_image_that_many_rows_show_is_looked_into_once(folder, monkeypatch):
    read: list[str] = []
    whole = samples.read_image_header
    monkeypatch.setattr(samples, "HEADER_THREADS", 1)  # two threads may come to it together
    monkeypatch.setattr(samples, "read_image_header", lambda path: (read.append(path.name), whole(path))[1])
    rows = [{**row(), "edit_image": "draft.png"} for _ in range(5)]
    Image.new("RGB", (48, 32)).save(folder / "draft.png")
    found, problems = build(folder, *rows, conditions=(ANY,))
    assert problems == [] and len(found.samples) == 5
    assert read == ["draft.png"]
