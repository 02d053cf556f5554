"""Precision and recall of the dataset checks: no findings in a clean set, exactly the planted ones in a faulty set."""

import errno
import os
import shutil
import stat
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from diffsynth_core.config.resolve import resolve
from diffsynth_core.data.findings import CODES
from diffsynth_core.dataset_report import validate as validation
from diffsynth_core.dataset_report.inspect import EXAMINERS, Job
from diffsynth_core.dataset_report.recipe_rules import rules_of_run
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.thresholds import Thresholds
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.progress import SilentReporter
from tests import faults_of_files, faults_of_rows
from tests.faults_of_files import Expected, Plant
from tests.validation_corpus import CLIPS, IMAGES, Draft, add_clips, add_images, rules_of_recipe

ALWAYS = {"BUCKETS", "CACHE_SIZE"}
"""Findings of every set."""
GENERAL = {**faults_of_files.IMAGES, **faults_of_rows.CAPTIONS, **faults_of_rows.PATHS, **faults_of_rows.ROWS}
ONLY_ALONE = faults_of_files.ANIMATIONS
"""A GIF is a video in a set of videos."""
WAN, EDIT = "wan2.1-t2v-1.3b-lora", "qwen-image-edit-lora"
ANY_SIZE = Thresholds(max_upscale=1000, min_area_share=0)
"""The images and clips of the corpus are small."""


@pytest.fixture
def in_this_process(monkeypatch):
    """Check files in this process: starting workers takes longer than a small set."""

    def inspect_files(job: Job, files, workers, timeout, reporter):
        return {name: EXAMINERS[kind](job, name) for name, kind in files.items()}

    monkeypatch.setattr(validation, "inspect_files", inspect_files)


@pytest.fixture(autouse=True)
def root_may_open_no_more_than_others(monkeypatch):
    """Deny root access to a folder without permissions, as the system does for others."""
    opens = os.scandir

    def scandir(path):
        if not Path(path).stat().st_mode & stat.S_IRUSR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opens(path)

    monkeypatch.setattr("os.scandir", scandir)


def found_in(folder: Path, recipe: str | None = None) -> Expected:
    """Return the findings of a dataset other than those of every set."""
    rules = rules_of_recipe(recipe, ANY_SIZE) if recipe else Rules()
    report, _ = validate(folder, rules, CheckOptions(), SilentReporter())
    findings = [one for one in report.findings if one.code not in ALWAYS or one.level != "info"]
    places = [(one.code, one.row, one.path) for one in findings]
    assert len(set(places)) == len(places), "something is told twice"
    assert report.exit_code == any(one.level == "error" for one in findings)
    return set(places)


def three_images(folder: Path) -> Draft:
    """A draft of three valid rows."""
    folder.mkdir()
    draft = Draft(folder)
    for _ in range(3):
        draft.sound_row()
    return draft


def with_column(folder: Path, column: str) -> Draft:
    """A draft of three valid rows with another image of the same size in `column`; half of a mask is dark."""
    draft = three_images(folder)
    for number, row in enumerate(draft.rows, start=1):
        assert isinstance(row, dict)
        row[column] = f"{column}_{number}.png"
        with Image.open(folder / row["image"]) as one:
            other = Image.linear_gradient("L").resize(one.size) if column == "mask" else ImageOps.invert(one)
            other.save(folder / row[column])
    return draft


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory) -> Path:
    """The folder of two valid clips."""
    folder = tmp_path_factory.mktemp("clips")
    add_clips(Draft(folder, "video"), 2)
    return folder


def copied(clips: Path, folder: Path) -> Draft:
    """A draft of two valid clips."""
    shutil.copytree(clips, folder)
    draft = Draft(folder, "video", numbers=count(2))
    for path in sorted(folder.iterdir()):
        draft.row(path.name)
    return draft


def cases(plants: Mapping[str, Plant]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plant", plants.values(), ids=list(plants))


@cases({**GENERAL, **ONLY_ALONE, **faults_of_rows.HARMLESS})
def test_a_fault_among_images_is_found_and_nothing_else(tmp_path, in_this_process, plant: Plant) -> None:
    draft = three_images(tmp_path / "set")
    expected = plant(draft)
    draft.write()
    assert found_in(draft.folder) == expected


@cases(faults_of_rows.OBJECTS)
def test_a_fault_of_a_metadata_jsonl(tmp_path, in_this_process, plant: Plant) -> None:
    draft = three_images(tmp_path / "set")
    expected = plant(draft)
    draft.sound_row()
    draft.write("jsonl")
    assert found_in(draft.folder) == expected


def test_all_faults_of_a_metadata_jsonl(tmp_path, in_this_process) -> None:
    draft = three_images(tmp_path / "set")
    expected = [plant(draft) for plant in faults_of_rows.OBJECTS.values()]
    draft.write("jsonl")
    assert found_in(draft.folder) == set().union(*expected)


@cases(faults_of_rows.CAPTION_FILES)
def test_a_fault_of_captions_beside_images(tmp_path, in_this_process, plant: Plant) -> None:
    draft = three_images(tmp_path / "set")
    expected = plant(draft)
    assert found_in(draft.folder) == expected


@cases(faults_of_rows.WHOLE)
def test_a_fault_of_the_whole_metadata(tmp_path, in_this_process, plant: Plant) -> None:
    draft = three_images(tmp_path / "set")
    expected = plant(draft)
    unused = {("FILE_UNREFERENCED", None, row["image"]) for row in draft.rows if isinstance(row, dict)}
    assert found_in(draft.folder) - unused == expected


def test_nothing_is_said_of_what_a_spreadsheet_writes(tmp_path, in_this_process) -> None:
    draft = three_images(tmp_path / "set")
    draft.write().write_text(draft.text().replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert found_in(draft.folder) == set()


OF_COLUMNS = [
    ("edit_image", None, faults_of_files.EDITS),
    ("edit_image", EDIT, faults_of_files.EDITS | faults_of_files.EDITS_OF_A_RECIPE),
    ("controlnet_image", None, faults_of_files.OVERLAYS),
    ("mask", None, faults_of_files.MASKS),
]


@pytest.mark.parametrize(
    ("column", "recipe", "plant"),
    [
        pytest.param(column, recipe, plant, id=f"{name}, {recipe}")
        for column, recipe, plants in OF_COLUMNS
        for name, plant in plants.items()
    ],
)
def test_a_fault_of_images_that_belong_together(tmp_path, in_this_process, column, recipe, plant: Plant) -> None:
    draft = with_column(tmp_path / "set", column)
    expected = plant(draft)
    draft.write()
    assert found_in(draft.folder, recipe) == expected


@pytest.mark.parametrize(("column", "recipe", "plants"), OF_COLUMNS)
def test_all_faults_of_images_that_belong_together(tmp_path, in_this_process, column, recipe, plants) -> None:
    draft = with_column(tmp_path / "set", column)
    draft.write()
    assert found_in(draft.folder, recipe) == set()
    expected = set().union(*(plant(draft) for plant in plants.values()))
    draft.write()
    assert found_in(draft.folder, recipe) == expected


@cases(faults_of_files.VIDEOS)
def test_a_fault_among_clips(tmp_path, in_this_process, two_clips, plant: Plant) -> None:
    draft = copied(two_clips, tmp_path / "set")
    expected = plant(draft)
    draft.write()
    assert found_in(draft.folder) == expected


def test_of_clean_clips_for_a_recipe_the_sizes_are_told(tmp_path, in_this_process, two_clips) -> None:
    draft = copied(two_clips, tmp_path / "set")
    draft.write()
    report, _ = validate(draft.folder, rules_of_recipe(WAN, ANY_SIZE), CheckOptions(), SilentReporter())
    assert report.summary.codes == dict.fromkeys(sorted(ALWAYS), 1)


@pytest.mark.parametrize("case", faults_of_files.SIZES)
def test_an_image_that_is_small_for_the_run(tmp_path, in_this_process, case) -> None:
    sizes, plant = faults_of_files.SIZES[case]
    draft = three_images(tmp_path / "set")
    expected = plant(draft)
    draft.write()
    rules = rules_of_run(resolve({"recipe": "qwen-image-lora", **sizes}), Thresholds(max_crop_loss=1))
    report, _ = validate(draft.folder, rules, CheckOptions(), SilentReporter())
    assert {(one.code, one.row, one.path) for one in report.findings if one.code not in ALWAYS} == expected


@cases(faults_of_files.CLIPS_OF_A_RECIPE)
def test_a_fault_of_clips_for_a_recipe(tmp_path, in_this_process, two_clips, plant: Plant) -> None:
    draft = copied(two_clips, tmp_path / "set")
    expected = plant(draft)
    draft.write()
    assert found_in(draft.folder, WAN) == expected


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (WAN, ("VIDEO_FRAMES", "info", None, "training uses one frame of 1 of 3 files")),
        (
            "wan2.1-i2v-14b-480p-lora",
            (
                "VIDEO_STILL",
                "warning",
                None,
                "training uses one frame of 1 of 3 files, which is also the condition (input_image): the model learns to copy it",
            ),
        ),
        (
            "wan2.2-ti2v-5b-lora",
            (
                "VIDEO_TOO_SHORT",
                "error",
                3,
                "`an image.png` has one frame, and the model conditions on the first frame: nothing is left to predict",
            ),
        ),
    ],
)
def test_an_image_among_clips_by_what_training_makes_of_it(
    tmp_path, in_this_process, two_clips, recipe, expected
) -> None:
    draft = copied(two_clips, tmp_path / "set")
    draft.photograph((160, 96)).save(draft.folder / "an image.png")
    draft.row("an image.png")
    draft.write()
    report, _ = validate(draft.folder, rules_of_recipe(recipe, ANY_SIZE), CheckOptions(), SilentReporter())
    told = [(one.code, one.level, one.row, one.message) for one in report.findings if one.code.startswith("VIDEO_")]
    of_clips = [one for one in told if "`clip_" in one[3]]  # TI2V uses fewer of their frames
    assert [one for one in told if one not in of_clips] == [expected]


def test_images_alone_teach_a_model_of_videos_no_motion(tmp_path, in_this_process) -> None:
    draft = three_images(tmp_path / "set")
    draft.write().write_text(draft.text().replace("image,", "video,", 1))
    assert ("VIDEO_STILL", None, None) in found_in(draft.folder, WAN)
    assert "VIDEO_STILL" not in {code for code, _, _ in found_in(draft.folder)}


def test_a_clean_set_is_clean_and_of_all_faults_together_each_is_found(tmp_path, capfd) -> None:
    """Distinguished by row and path, faults do not hide each other. The median frame rate remains that of the
    clean clips.
    """
    draft = Draft(tmp_path / "set", "video")
    draft.folder.mkdir()
    add_images(draft, IMAGES)
    add_clips(draft, CLIPS)
    draft.write()
    assert found_in(draft.folder) == set()
    mixed = GENERAL | faults_of_files.VIDEOS | faults_of_rows.HARMLESS
    expected = [plant(draft) for plant in mixed.values()]
    draft.write()
    assert found_in(draft.folder) == set().union(*expected)
    assert capfd.readouterr() == ("", ""), "what decoders think of faulty files is not for the terminal"


def test_every_code_has_a_fault_and_there_are_enough() -> None:
    modules = (faults_of_files, faults_of_rows)
    every = {name: one for module in modules for name, one in vars(module).items() if name.isupper()}
    tables = [one for name, one in every.items() if isinstance(one, dict) and name != "HARMLESS"]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) >= 60
    text = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    assert [code for code in CODES if f'"{code}"' not in text and code not in ALWAYS] == []
