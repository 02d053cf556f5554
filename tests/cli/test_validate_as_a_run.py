"""`dataset validate` matches the run: the same parameters, the same rejections, and hints that solve them."""

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.dataset_columns import column_hints
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.planning.data.dataset import read_dataset
from diffsynth_core.progress import SilentReporter
from tests.cli.conftest import read_problems
from tests.naming import names

KLEIN = "flux.2-klein-4b-lora"
READERS_OF_DATA = {name for name, setting in SETTINGS.items() if setting.reads_data}


@pytest.fixture
def findings(cli, dataset) -> Callable[..., list[tuple[str, str, str | None]]]:
    """Check the dataset; return (level, code, hint) of findings other than dataset facts."""

    def run(*arguments: object) -> list[tuple[str, str, str | None]]:
        outcome = cli("dataset", "validate", dataset, "--workers", 1, "--format", "json", *arguments)
        assert outcome.code in (0, 1), outcome.err
        return [
            (one["level"], one["code"], one["hint"])
            for one in json.loads(outcome.out)["findings"]
            if one["code"] not in ("BUCKETS", "CACHE_SIZE", "IMAGE_LOW_RESOLUTION", "FILE_UNREFERENCED")
        ]

    return run


def write_rows(dataset: Path, *rows: list[str]) -> None:
    with (dataset / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


PAIRS = (["image", "edit_image", "prompt"], ["coffee.png", "rocket.png", "a rocket"])


def test_every_parameter_that_reads_data_is_an_option_in_both_spellings(cli):
    said = cli("dataset", "validate", "--help").out
    options = set(re.findall(r"--([a-z0-9_]+)", said))
    assert options >= READERS_OF_DATA
    assert {"height", "num_frames", "extra_inputs", "data_file_keys", "dataset_metadata_path"} <= READERS_OF_DATA
    assert not {"lora_rank", "learning_rate", "output_path"} & options


@pytest.mark.parametrize("spelling", ["--num_frames", "--num-frames"])
def test_flags_go_over_the_config_which_goes_over_the_recipe(cli, dataset, config, spelling):
    path = config("parameters:\n  num_frames: 6\n  height: 64\n  width: 64\n")
    wan = ("dataset", "validate", dataset, "--recipe", "wan2.1-t2v-1.3b-lora")
    outcome = cli(*wan, "--config", path)
    assert (outcome.code, [message[:14] for message, _ in read_problems(outcome.err)]) == (2, ["`num_frames` 6"])
    outcome = cli(*wan, "--config", path, spelling, 7)
    assert (outcome.code, [message[:14] for message, _ in read_problems(outcome.err)]) == (2, ["`num_frames` 7"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--height", 30, "--width", 64),
        ("--height", 64),
        ("--max_pixels", "many"),
        ("--extra_inputs", "edit_imag"),
        ("--data_file_keys", "video"),
        ("--num_frames", 5),
        ("--recipe", "qwen-image-lorra"),
        ("--dataset_metadata_path", "nowhere.csv"),
        ("--only", "high"),
    ],
)
def test_train_and_validate_refuse_parameters_in_the_same_words(cli, refuse, dataset, arguments):
    recipe = () if "--recipe" in arguments else ("--recipe", "qwen-image-lora")
    outcome = cli("dataset", "validate", dataset, *recipe, *arguments)
    code, problems = refuse(*arguments, recipe=None if "--recipe" in arguments else "qwen-image-lora")
    assert (outcome.code, outcome.out) == (code, "")
    assert read_problems(outcome.err) == problems


def test_an_unknown_key_of_a_config_is_refused_by_both(cli, refuse, dataset, config, says):
    path = config("family: qwen-image\nparameters:\n  max_pixls: 4096\n")
    outcome = cli("dataset", "validate", dataset, "--config", path)
    assert outcome.code == 2
    assert read_problems(outcome.err) == [(names("max_pixls", path, "not a parameter"), names("max_pixels"))]
    assert read_problems(outcome.err)[0] in refuse("--config", path)[1]
    says(outcome)


def test_options_of_training_alone_and_misspelled_ones(cli, dataset, says):
    outcome = cli("dataset", "validate", dataset, "--lora_rank", 8, "--no-dry_run", "--heigth=64")
    assert outcome.code == 2
    assert "`--lora_rank`" in outcome.err and outcome.err == names("hint:", "--height")
    says(outcome)


def test_a_recipe_of_ones_own_is_sent_to_a_flag_that_validate_has(cli, dataset, config):
    path = config("family: qwen-image\nparameters:\n  max_pixels: 4096\n")
    outcome = cli("dataset", "validate", dataset, "--recipe", path)
    ((_, hint),) = read_problems(outcome.err)
    assert (outcome.code, hint) == (2, names(f"--config {path}"))
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", *shlex.split(hint.split("`")[1]))
    assert outcome.code == 0 and outcome.out == names("rules", path)


def test_the_dataset_of_a_config_file(cli, dataset, config, tmp_path, says):
    path = config(f"family: qwen-image\nparameters:\n  dataset_base_path: {dataset}\n")
    assert cli("dataset", "validate", "--config", path, "--depth", "paths").code == 0
    outcome = cli("dataset", "validate", "--recipe", "qwen-image-lora")
    assert (outcome.code, read_problems(outcome.err)) == (
        2,
        [("no dataset given", names("diffsynth dataset validate PATH"))],
    )
    outcome = cli("dataset", "validate", dataset, "--dataset_base_path", tmp_path)
    assert outcome.code == 2 and outcome.err == names("--dataset_base_path", tmp_path)
    says(outcome)


def test_parameters_that_need_to_know_the_kind_of_model(cli, dataset, says):
    outcome = cli("dataset", "validate", dataset, "--num_frames", 5, "--extra_inputs", "edit_image")
    assert outcome.code == 2 and "`num_frames`" in outcome.err and "`extra_inputs`" in outcome.err
    says(outcome)


def test_stages_that_read_data_differently(cli, dataset, config):
    text = "family: qwen-image\nstages:\n  small:\n    parameters:\n      max_pixels: 4096\n  large:\n"
    path = config(text)
    outcome = cli("dataset", "validate", dataset, "--config", path, "--depth", "paths")
    ((message, hint),) = read_problems(outcome.err)
    assert (outcome.code, message) == (2, names("max_pixels", "small, large"))
    assert hint == names("--only")
    assert cli("dataset", "validate", dataset, "--config", path, "--depth", "paths", "--only", "small").code == 0


def test_a_forgotten_condition_is_named_by_both_and_its_hint_makes_it_read(cli, findings, dataset, recipe_models, says,
                                                                           monkeypatch):  # fmt: skip
    """Editing pairs without `--extra_inputs` would train text to image."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models(KLEIN)))
    write_rows(dataset, *PAIRS)
    flags = "--data_file_keys image,video,edit_image --extra_inputs edit_image"
    hint = names(f"`{flags}`")
    assert findings("--recipe", KLEIN) == [("warning", "COLUMN_UNKNOWN", hint)]
    train = ("train", "--recipe", KLEIN, "--dataset_base_path", dataset, "--device", "cpu", "--dry_run")
    outcome = cli(*train)
    assert outcome.code == 0, outcome.err
    assert outcome.out == names(f"{dataset}/metadata.csv", "edit_image", "not read")
    assert flags in outcome.out
    told = [line for line in outcome.out.splitlines() if line.startswith(("warning: ", "  hint: "))]
    says("\n".join(told))
    followed = cli(*train, "--verbose", *flags.split())
    assert (
        followed.code == 0 and "unused columns" not in followed.out and "reference images (edit_image)" in followed.out
    )
    assert findings("--recipe", KLEIN, *flags.split()) == []


@pytest.mark.parametrize(
    ("recipe", "column"),
    [(recipe, column) for recipe in ("qwen-image-lora", "qwen-image-edit-lora", "flux.1-dev-lora", KLEIN,
                                     "flux.1-kontext-dev-lora", "wan2.1-i2v-14b-480p-lora", "wan2.1-t2v-1.3b-lora")
     for column in ("edit_image", "kontext_images", "controlnet_image", "input_image", "end_image", "control_video",
                    "vace_video", "seed")],
)  # fmt: skip
def test_what_a_hint_about_a_condition_names_is_taken(recipe, column):
    resolved = resolve({"recipe": recipe})
    facts = FAMILIES[resolved.family]
    parameters, named = resolved.parameters, ", ".join(resolved.parameters.model_id_with_origin_paths)
    variant = facts.variant({}, parameters.extra_inputs, named)
    hint = column_hints(parameters, facts, variant)[column]
    flags = dict(re.findall(r"--(data_file_keys|extra_inputs) ([a-z0-9_,]+)", hint))
    assert flags.keys() in (set(), {"data_file_keys", "extra_inputs"})
    if flags:
        inputs = tuple(flags["extra_inputs"].split(","))
        after = facts.variant({}, inputs, named)
        assert set(inputs) <= set(after.accepted_inputs) and column in {shown.column for shown in after.conditions}
        assert {shown.column for shown in after.conditions} <= set(flags["data_file_keys"].split(","))
    else:
        together = facts.variant({}, (*parameters.extra_inputs, column), named).accepted_inputs
        assert column not in {one.column for one in facts.conditions} or not {*parameters.extra_inputs, column} <= set(
            together
        )


CAPTIONED = "image,prompt\n"
ROWS_OF_DISTILLING = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale\n"
DISTIL = ("--task", "direct_distill")
SHOWN = ("--extra_inputs", "edit_image", "--data_file_keys", "image,edit_image")


def empty_files(*names: str) -> Callable[[Path], None]:
    return lambda folder: [folder.joinpath(name).write_bytes(b"") for name in names] and None


def tiny(name: str, size: tuple[int, int]) -> Callable[[Path], None]:
    return lambda folder: Image.new("RGB", size, (9, 90, 200)).save(folder / name)


def beside(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    for name in ("coffee", "chelsea", "rocket"):
        (folder / f"{name}.txt").write_text(name)


def latin(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes("image,prompt\ncoffee.png,café\n".encode("latin-1"))


FAULTS: dict[str, tuple[str, str | Callable[[Path], None], Callable[[Path], None], tuple[str, ...]]] = {
    "not UTF-8": ("NOT_UTF8", latin, empty_files(), ()),
    "an open quote": ("PARSE_ERROR", CAPTIONED + 'coffee.png,"a\n', empty_files(), ()),
    "no rows": ("EMPTY", CAPTIONED, empty_files(), ()),
    "no column": ("COLUMN_MISSING", "image,text\ncoffee.png,a\n", empty_files(), ()),
    "an empty cell": ("CELL_EMPTY", CAPTIONED + ",a\n", empty_files(), ()),
    "no file": ("PATH_MISSING", CAPTIONED + "no.png,a\n", empty_files(), ()),
    "other letters": ("PATH_CASE", CAPTIONED + "COFFEE.png,a\n", empty_files(), ()),
    "outside": ("PATH_OUTSIDE", CAPTIONED + "../coffee.png,a\n", empty_files(), ()),
    "an address": ("URL", CAPTIONED + "https://a.b/c.png,a\n", empty_files(), ()),
    "two files": ("PAIR_COUNT", CAPTIONED + '"[""coffee.png"", ""rocket.png""]",a\n', empty_files(), ()),
    "no image": ("IMAGE_UNREADABLE", CAPTIONED + "x.png,a\n", empty_files("x.png"), ()),
    "a small image": ("IMAGE_TOO_SMALL", CAPTIONED + "x.png,a\n", tiny("x.png", (15, 64)), ()),
    "nan": ("CAPTION_NAN", CAPTIONED + "coffee.png,nan\n", empty_files(), ()),
    "no caption beside": ("CAPTION_MISSING", beside, empty_files(), ()),
    "a reference missing": ("PAIR_MISSING", "image,edit_image,prompt\ncoffee.png,,a\n", empty_files(), SHOWN),
    "a narrow reference": (
        "IMAGE_TOO_SMALL", "image,edit_image,prompt\ncoffee.png,x.png,a\n", tiny("x.png", (16, 3300)), SHOWN,
    ),
    "a seed of letters": (
        "CELL_TYPE", ROWS_OF_DISTILLING + "coffee.png,a,abc,cpu,4,1\n", empty_files(), DISTIL,
    ),
    "guidance": ("CELL_TYPE", ROWS_OF_DISTILLING + "coffee.png,a,1,cpu,4,3\n", empty_files(), DISTIL),
}  # fmt: skip
"""Case -> code, metadata, other changes of the folder, and flags of the run."""


@pytest.mark.parametrize("case", FAULTS)
def test_what_train_refuses_validate_finds_and_the_other_way(cli, dataset, case):
    code, metadata, spoil, flags = FAULTS[case]
    if isinstance(metadata, str):
        (dataset / "metadata.csv").write_text(metadata)
    else:
        metadata(dataset)
    spoil(dataset)
    outcome = cli(
        "dataset", "validate", dataset, "--recipe", "qwen-image-lora", "--workers", 1, "--format", "json", *flags
    )
    found = {one["code"] for one in json.loads(outcome.out)["findings"] if one["level"] == "error"}
    given = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    resolved = resolve({"recipe": "qwen-image-lora", "dataset_base_path": dataset, **given})
    facts = FAMILIES["qwen-image"]
    variant = facts.variant({}, resolved.parameters.extra_inputs, "")
    _, problems = read_dataset(resolved.parameters, facts, variant, SilentReporter())
    assert found == {problem.code for problem in problems} == {code}
    assert all(problem.hint for problem in problems)
    assert outcome.code == 1


def test_no_caption_has_one_code_and_one_hint(cli, dataset, says):
    (dataset / "metadata.csv").write_text("image,prompt\n" + "".join(f"{name}.png,\n" for name in ("coffee", "rocket")))
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert (
        outcome.code == 0
        and "warning CAPTION_MISSING (2)" in outcome.out
        and outcome.out.count("hint: write a caption") == 1
    )
    (dataset / "metadata.csv").unlink()
    for number in range(12):
        (dataset / f"x{number:02}.png").write_bytes(b"")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert outcome.code == 1 and "error CAPTION_MISSING (16)" in outcome.out
    lines = outcome.out.splitlines()
    assert outcome.out.count("hint: ") == 1 and len(lines) < 16
    says("\n".join(lines[:10]))


def test_many_faults_of_a_kind_are_capped_and_share_their_hint(refuse, cli, dataset, models, says):
    rows = "".join(f"no{number}.png,a\n" for number in range(30))
    (dataset / "metadata.csv").write_text(f"image,prompt\n{rows}coffee.png,nan\n")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--device", "cpu", "--dataset_base_path", dataset)
    assert outcome.code == 1
    assert outcome.err.count("hint: correct the path") == 1 and outcome.err.count("no9.png") == 1
    assert "no10.png" not in outcome.err and "and 20 more" in outcome.err and "31 problems" in outcome.err
    says(outcome, r"Reading image headers.*\n")
    every = cli("dataset", "validate", dataset, "--recipe", "qwen-image-lora", "--depth", "paths", "--format", "json")
    assert "no29.png" in every.out


WARNINGS = ("warning: ", "  hint: ")


def plan_warnings(out: str) -> list[str]:
    """Return the warning lines of a plan."""
    return [line for line in out.splitlines() if line.startswith(WARNINGS)]


def test_files_that_are_scaled_up_are_counted_in_the_plan_and_found_one_by_one(cli, findings, dataset, models, says):
    for name, size in (("coffee.png", (64, 48)), ("rocket.png", (300, 200))):
        Image.effect_noise(size, 80).convert("RGB").save(dataset / name)
    fixed = ("--recipe", "qwen-image-lora", "--height", 384, "--width", 512)
    scaled = [one for one in findings(*fixed) if one[1] == "IMAGE_UPSCALED"]
    assert [level for level, _, _ in scaled] == ["warning"] * 4
    outcome = cli("train", *fixed, "--dataset_base_path", dataset, "--device", "cpu", "--dry_run")
    assert outcome.out == names("4 of 4 images", "8x")
    says("\n".join(plan_warnings(outcome.out)))
    assert [one for one in findings(*fixed, "--max_upscale", 9) if one[1] == "IMAGE_UPSCALED"] == []


def test_files_far_below_the_usual_size(cli, dataset, models, says):
    recipe = ("--recipe", "qwen-image-lora")
    outcome = cli("train", *recipe, "--dataset_base_path", dataset, "--device", "cpu", "--dry_run")
    assert outcome.out == names("4 of 4 images", "1,048,576 pixels")
    said = cli("dataset", "validate", dataset, "--workers", 1, *recipe)
    assert said.code == 0 and "warning IMAGE_LOW_RESOLUTION (4)" in said.out
    says("\n".join([*plan_warnings(outcome.out), *said.out.splitlines()[:7]]))
    meant = (*recipe, "--max_pixels", 4096)
    assert "IMAGE_LOW_RESOLUTION" not in cli("dataset", "validate", dataset, "--workers", 1, *meant).out
    outcome = cli("train", *meant, "--dataset_base_path", dataset, "--device", "cpu", "--dry_run")
    assert plan_warnings(outcome.out) == []


def test_a_reference_image_that_is_scaled_up(findings, dataset):
    write_rows(dataset, *PAIRS)
    assert ("warning", "IMAGE_UPSCALED", names("larger file")) in findings("--recipe", "qwen-image-edit-lora")


def test_a_dataset_that_was_not_named_is_a_warning(cli, dataset, models, monkeypatch, says):
    monkeypatch.chdir(dataset.parent)
    (dataset.parent / "data").mkdir()
    dataset.rename(dataset.parent / "data" / "example_image_dataset")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--device", "cpu", "--max_pixels", 4096, "--dry_run")
    assert outcome.code == 0, outcome.err
    assert outcome.out == names("warning: dataset", "data/example_image_dataset", "the default")
    says("\n".join(plan_warnings(outcome.out)))
    named = ("--dataset_base_path", "data/example_image_dataset", "--max_pixels", 4096, "--dry_run")
    assert plan_warnings(cli("train", "--recipe", "qwen-image-lora", "--device", "cpu", *named).out) == []


def test_a_rehearsal_of_a_dataset_that_is_missing(cli, tmp_path, config, monkeypatch, says):
    """Set by a flag or in a config file: no synthetic dataset replaces it."""
    monkeypatch.chdir(tmp_path)
    message = names("nowhere", "dataset_base_path", "does not exist"), names("--dataset_base_path")
    path = config("parameters:\n  dataset_base_path: nowhere\n")
    for named in (
        ("--dataset_base_path", "nowhere"),
        ("--config", path),
        ("--dataset_base_path", "nowhere", "--dry_run"),
    ):
        outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--device", "cpu", *named)
        assert (outcome.code, read_problems(outcome.err)) == (1, [message])
    assert not (tmp_path / "rehearsals").exists()
