"""Mismatches between the stages of two-stage training: reported before reading weights, with nothing written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.data.encoded_samples import EncodedSamples, read_encoded, write_encoded
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.precompute import precompute
from tests.conftest import ENTRIES
from tests.naming import names
from tests.wan import T2V, entries

FIRST = ("--task", "sft:data_process", "--output_path", "out")
LORA = ("--lora_base_model", "dit", "--lora_target_modules", "to_q")


@pytest.fixture(scope="module")
def written(tiny_models, photographs, tmp_path_factory) -> Path:
    """Precomputed encodings of the photographs."""
    folder = tmp_path_factory.mktemp("written")
    flags = {
        "recipe": "qwen-image-lora",
        "task": "sft:data_process",
        "dataset_base_path": str(photographs),
        "dataset_num_workers": "0",
        "device": "cpu",
        "output_path": str(folder / "encoded"),
    }
    precompute(make_plan(resolve(flags), SilentReporter(), base=tiny_models), SilentReporter(), StopRequest())
    return folder / "encoded"


@pytest.fixture
def encoded(written, tmp_path) -> Path:
    """A copy of them that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "encoded"))


@pytest.fixture
def second(refuse, encoded):
    """Start the train task, which must be rejected."""

    def run(*arguments: object, files: str = ENTRIES["dit"], **other: object):
        named = ("--model_id_with_origin_paths", files, *LORA)
        start = ("--task", "sft:train", *named, "--dataset_base_path", encoded, "--output_path", "run")
        return refuse(*start, *arguments, recipe=None)

    return run


def change(folder: Path, **changes: object) -> EncodedSamples:
    """Change the origin of the samples in a folder."""
    found = read_encoded(folder)
    changed = replace(found, origin=replace(found.origin, **changes))
    write_encoded(changed)
    return changed


def first_encoding(folder: Path) -> Path:
    return next(path for path, _ in read_encoded(folder).paths())


def test_a_folder_that_is_not_there(second, encoded):
    shutil.rmtree(encoded)
    assert second() == (
        1,
        [
            (
                names(encoded, "dataset_base_path", "does not exist"),
                names(f"--task sft:data_process --output_path {encoded}"),
            )
        ],
    )


def test_a_folder_without_a_manifest(second, encoded):
    (encoded / "encoded.json").unlink()
    assert second() == (
        2,
        [
            (
                names("dataset_base_path", encoded, "encoded.json", "missing"),
                names(f"--task sft:data_process --output_path {encoded}"),
            )
        ],
    )


def test_a_first_half_that_was_stopped(second, encoded):
    write_encoded(replace(read_encoded(encoded), samples=(), files=()))
    assert second() == (1, [(names(encoded, "sft:data_process", "interrupted"), names("sft:data_process"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", names("not valid JSON", "line 1", "column 1", "is empty")),
        (lambda text: "{}", names("no `format`", "format 1")),
        (lambda text: '{"format": 1}', names("complete", "fingerprint", "origin", "samples", "missing")),
        (lambda text: "[]", names("a list", "an object")),
        (lambda text: text.replace('"row":2', '"row":"2"'), names("samples[1].row", '"2"', "an integer")),
        (lambda text: text.replace(',"files":[[', ',"files":[3,['), names("samples[0].files[0]", 3, "a list")),
        (lambda text: text.replace(',"files":[[', ',"files":[],"x":[['), names("unknown key", "x", "samples[0]")),
    ],
)
def test_a_manifest_that_is_damaged(second, encoded, change, message):
    path = encoded / "encoded.json"
    path.write_text(change(path.read_text()))
    code, [(printed, hint)] = second()
    assert (code, printed) == (1, names(path, message))
    assert hint == names("encode")


def test_a_manifest_that_was_changed_by_hand(second, encoded):
    manifest = encoded / "encoded.json"
    manifest.write_text(manifest.read_text().replace('"precision":"no"', '"precision":"bf16"'))
    _, [(message, _)] = second()
    assert message == names(manifest, "edited", "fingerprint")


def test_a_manifest_of_another_version(second, encoded):
    content = json.loads((encoded / "encoded.json").read_text())
    (encoded / "encoded.json").write_text(json.dumps(content | {"format": 2}))
    _, [(message, _)] = second()
    assert message == names(encoded / "encoded.json", "format 2", 1)


def test_leftovers_of_another_run(second, encoded):
    leftover = encoded / "encodings" / "text" / "ab" / "leftover.safetensors"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(first_encoding(encoded), leftover)
    (encoded / "0.pth").touch()
    assert second() == (1, [(names(encoded, 2, "0.pth", "encodings/text/ab/leftover.safetensors"), names("move"))])


def test_encodings_that_are_missing_or_cut_short(second, encoded):
    samples = read_encoded(encoded)
    gone, cut = (samples.cache("text").path(files["text"][0].key) for files in samples.files[:2])
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    hint = names(":data_process", "missing")
    assert second() == (
        1,
        [
            (names(encoded, "1 of 8", "missing", gone.relative_to(encoded)), hint),
            (names(encoded, "1 of 8", "wrong size", cut.relative_to(encoded)), hint),
        ],
    )


def test_the_transformer_of_another_family(second, encoded, tiny_wan, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))
    wan = entries(T2V, text_encoder=None, vae=None)[1]
    assert second("--lora_target_modules", "q", files=wan) == (
        2,
        [(names(encoded, "Qwen-Image", "Wan (text to video)"), names("that kind"))],
    )


def test_samples_of_another_kind_of_the_family(second, encoded):
    change(encoded, kind="Qwen-Image-Edit", encoders={"text": [1, ["edit_image"]], "latents": [1, []]})
    _, [(message, _)] = second()
    assert message == names(encoded, "Qwen-Image-Edit", "Qwen-Image")


@pytest.mark.parametrize(
    ("component", "what", "axis", "taken"), [("text_encoder", "text states", 1, 64), ("vae", "latents", 0, 16)]
)
def test_samples_made_by_components_of_another_width(second, encoded, component, what, axis, taken):
    shapes = json.loads(json.dumps(read_encoded(encoded).origin.shapes))
    [tensor] = shapes[component]
    assert shapes[component][tensor][axis] == taken
    shapes[component][tensor][axis] = 48
    change(encoded, shapes=shapes)
    assert second() == (2, [(names(component, encoded, what, 48, "dit", "Qwen-Image", taken), names("encode"))])


@pytest.mark.parametrize("task", ["sft:data_process", "sft:train"])
@pytest.mark.parametrize("parameter", ["trainable_models", "lora_base_model"])
@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_components_whose_output_is_kept_cannot_train(refuse, encoded, dataset, task, parameter, component):
    base = encoded if task == "sft:train" else dataset
    flags = (
        "--task",
        task,
        "--dataset_base_path",
        base,
        "--output_path",
        "run",
        "--lora_target_modules",
        "q_proj,conv1",
    )
    code, problems = refuse(*flags, f"--{parameter}", component)
    assert code == 2
    assert (names(parameter, component, "sft:data_process"), names("--task sft")) in problems


def test_a_lora_for_an_encoder_comes_too_late(second, tmp_path):
    code, problems = second("--preset_lora_path", tmp_path / "a.safetensors", "--preset_lora_model", "text_encoder")
    assert code == 2 and problems[0] == (
        names("preset_lora_model", "text_encoder", "sft:data_process"),
        names("sft:data_process"),
    )


def test_a_dataset_in_place_of_encoded_samples(refuse, dataset):
    assert refuse("--task", "sft:train", "--output_path", "run") == (
        2,
        [
            (
                names("dataset_base_path", dataset, "is a dataset", "sft:train"),
                names("--task sft:data_process", "--task sft"),
            )
        ],
    )


@pytest.mark.parametrize("task", ["sft", "sft:data_process"])
def test_encoded_samples_in_place_of_a_dataset(refuse, encoded, task):
    assert refuse("--task", task, "--dataset_base_path", encoded, "--output_path", "run") == (
        2,
        [(names("dataset_base_path", encoded, "contains encoded samples", task), names("--task sft:train", "dataset"))],
    )


def test_samples_of_another_objective(second, encoded):
    change(encoded, objective="direct_distill")
    assert second() == (
        2,
        [
            (
                names(encoded, "direct_distill:data_process", "sft:train", "sft:data_process"),
                names("--task direct_distill:train", "--task sft:data_process"),
            )
        ],
    )


def test_a_file_that_asks_for_other_samples(second, encoded, config):
    path = config("parameters:\n  max_pixels: 4096\n")
    _, [(message, _)] = second("--config", path)
    assert message == names("max_pixels", 4096, encoded, 1048576)


def test_the_sizes_of_encoded_samples_are_told(cli, encoded):
    """Sizes in a recipe apply to both stages, and are overridden by those of the samples."""
    start = ("--task", "sft:train", "--recipe", "qwen-image-lora", "--dataset_base_path", encoded, "--dry_run", "-v")
    assert cli("train", *start).out == names("precomputed for Qwen-Image", "precision no", "max_pixels 1048576")


@pytest.mark.parametrize(
    ("arguments", "asked", "made"),
    [
        (("--max_pixels", 4096), names("max_pixels", 4096), "`1048576`"),
        (("--height", 32, "--width", 32), names("height", 32), "without it"),
        (("--extra_inputs", "edit_image"), names("extra_inputs", "edit_image"), "without it"),
    ],
)
def test_flags_that_ask_for_other_samples(second, encoded, arguments, asked, made):
    code, problems = second(*arguments)
    assert code == 2 and problems[0] == (names(asked, encoded, made), names("remove"))


def test_metadata_for_a_second_half(second, dataset):
    assert second("--dataset_metadata_path", dataset / "metadata.csv") == (
        2,
        [(names("dataset_metadata_path", "no effect", "sft:train"), "remove it")],
    )


def test_a_run_in_the_folder_that_it_reads(second, encoded):
    code, problems = second("--output_path", f"{encoded.parent}/./encoded")
    assert code == 2 and problems == [(names("output_path", encoded), names("--output_path"))]


def test_a_first_half_into_a_folder_in_use(refuse, dataset):
    assert refuse(*FIRST, "--output_path", dataset) == (
        2,
        [(names("output_path", dataset, "not empty"), names("--output_path"))],
    )


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--max_pixels", 2048), names("max_pixels", 1048576, 2048)),
        (("--mixed_precision", "bf16"), names("precision", "no", "bf16")),
    ],
)
def test_a_first_half_into_that_of_another(refuse, encoded, arguments, difference):
    assert refuse(*FIRST, "--output_path", encoded, *arguments) == (
        2,
        [(names("output_path", encoded, difference), names("--output_path"))],
    )


def test_a_first_half_with_another_caption(refuse, encoded, dataset):
    metadata = dataset / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("a cat", "a dog"))
    _, [(message, _)] = refuse(*FIRST, "--output_path", encoded)
    assert message == names("output_path", encoded, "has changed")


def test_a_first_half_with_other_images_of_the_same_size(cli, encoded, dataset, models):
    """A difference in bytes only is reported when they are hashed, before loading weights."""
    one, other = dataset / "coffee.png", dataset / "rocket.png"
    first, second = one.read_bytes(), other.read_bytes()
    longest = max(len(first), len(second))
    for path, content in ((one, first), (other, second)):
        path.write_bytes(content.ljust(longest, b"\0"))
    command = ("train", "--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--device", "cpu")
    command += ("--dataset_base_path", dataset, *FIRST)
    assert cli(*command).code == 0
    one.write_bytes(second.ljust(longest, b"\0"))
    other.write_bytes(first.ljust(longest, b"\0"))
    outcome = cli(*command)
    assert outcome.code == 1 and "Loading" not in outcome.err
    assert outcome.err == names("dataset changed", "out")


@pytest.mark.parametrize("half", ["data_process", "train"])
def test_a_half_is_not_rehearsed(refuse, half):
    code, problems = refuse("--task", f"sft:{half}", "--rehearse", "--output_path", "run")
    assert code == 2 and problems[0] == (names("rehearse", "task", f"sft:{half}"), names("--task sft"))
