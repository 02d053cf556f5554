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
from diffsynth_core.training.precompute import precompute
from diffsynth_core.training.stop import StopRequest
from tests.conftest import ENTRIES
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
                f"the folder of encoded samples `{encoded}` (`dataset_base_path`) does not exist",
                f"create them with `--task sft:data_process --output_path {encoded}`",
            )
        ],
    )


def test_a_folder_without_a_manifest(second, encoded):
    (encoded / "encoded.json").unlink()
    assert second() == (
        2,
        [
            (
                f"`dataset_base_path` `{encoded}` contains no encoded samples: `encoded.json` is missing",
                f"create them with `--task sft:data_process --output_path {encoded}`",
            )
        ],
    )


def test_a_first_half_that_was_stopped(second, encoded):
    write_encoded(replace(read_encoded(encoded), samples=(), files=()))
    assert second() == (
        1,
        [
            (
                f"precomputation in `{encoded}` did not finish: `sft:data_process` was interrupted",
                "run the command of `sft:data_process` again to resume it",
            )
        ],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", " is not valid JSON: line 1, column 1: it is empty"),
        (lambda text: "{}", " has format null, but this version reads 1"),
        (lambda text: '{"format": 1}', ": `complete`, `fingerprint`, `origin`, `samples` are missing"),
        (lambda text: "[]", ": the top level is a list, expected an object"),
        (lambda text: text.replace('"row":2', '"row":"2"'), ': `samples[1].row` is `"2"`, expected an integer'),
        (lambda text: text.replace(',"files":[[', ',"files":[3,['), ": `samples[0].files[0]` is `3`, expected a list"),
        (lambda text: text.replace(',"files":[[', ',"files":[],"x":[['), ": unknown key `x` in `samples[0]`"),
    ],
)
def test_a_manifest_that_is_damaged(second, encoded, change, message):
    path = encoded / "encoded.json"
    path.write_text(change(path.read_text()))
    code, [(told, hint)] = second()
    assert (code, told) == (1, f"`{path}`{message}")
    assert hint == "encode the samples again"


def test_a_manifest_that_was_changed_by_hand(second, encoded):
    manifest = encoded / "encoded.json"
    manifest.write_text(manifest.read_text().replace('"precision":"no"', '"precision":"bf16"'))
    _, [(message, _)] = second()
    assert message == f"`{manifest}` was edited: fingerprint mismatch"


def test_a_manifest_of_another_version(second, encoded):
    content = json.loads((encoded / "encoded.json").read_text())
    (encoded / "encoded.json").write_text(json.dumps(content | {"format": 2}))
    _, [(message, _)] = second()
    assert message == f"`{encoded / 'encoded.json'}` has format 2, but this version reads 1"


def test_leftovers_of_another_run(second, encoded):
    leftover = encoded / "encodings" / "text" / "ab" / "leftover.safetensors"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(first_encoding(encoded), leftover)
    (encoded / "0.pth").touch()
    assert second() == (
        1,
        [
            (
                f"`{encoded}` contains 2 files that are not part of its encoded samples: "
                "`0.pth`, `encodings/text/ab/leftover.safetensors`",
                "move them elsewhere, or encode into a separate folder",
            )
        ],
    )


def test_encodings_that_are_missing_or_cut_short(second, encoded):
    (_, gone), (_, cut) = (next(iter(files.items())) for files in read_encoded(encoded).files[:2])
    gone, cut = (read_encoded(encoded).cache("text").path(file.key) for file in (gone, cut))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    hint = "run the `:data_process` command again to encode what is missing"
    assert second() == (
        1,
        [
            (f"`{encoded}`: 1 of 8 encodings are missing; the first is `{gone.relative_to(encoded)}`", hint),
            (f"`{encoded}`: 1 of 8 encodings have the wrong size; the first is `{cut.relative_to(encoded)}`", hint),
        ],
    )


def test_the_transformer_of_another_family(second, encoded, tiny_wan, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))
    wan = entries(T2V, text_encoder=None, vae=None)[1]
    assert second("--lora_target_modules", "q", files=wan) == (
        2,
        [
            (
                f"the samples in `{encoded}` were encoded for Qwen-Image, but the model is Wan (text to video)",
                "use a model of that kind, or encode them for this one",
            )
        ],
    )


def test_samples_of_another_kind_of_the_family(second, encoded):
    change(encoded, kind="Qwen-Image-Edit", encoders={"text": [1, ["edit_image"]], "latents": [1, []]})
    _, [(message, _)] = second()
    assert message == f"the samples in `{encoded}` were encoded for Qwen-Image-Edit, but the model is Qwen-Image"


@pytest.mark.parametrize(
    ("component", "what", "axis", "taken"), [("text_encoder", "text states", 1, 64), ("vae", "latents", 0, 16)]
)
def test_samples_made_by_components_of_another_width(second, encoded, component, what, axis, taken):
    shapes = json.loads(json.dumps(read_encoded(encoded).origin.shapes))
    [tensor] = shapes[component]
    assert shapes[component][tensor][axis] == taken
    shapes[component][tensor][axis] = 48
    change(encoded, shapes=shapes)
    assert second() == (
        2,
        [
            (
                f"the {component} from `{encoded}` makes {what} with 48 channels, but the dit of Qwen-Image expects {taken}",
                "encode the samples with the components of the same model",
            )
        ],
    )


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
    assert (
        f"`{parameter}` names `{component}`, but `sft:data_process` precomputes the encodings of all samples with it",
        "train it with `--task sft`, or remove it",
    ) in problems


def test_a_lora_for_an_encoder_comes_too_late(second, tmp_path):
    code, problems = second("--preset_lora_path", tmp_path / "a.safetensors", "--preset_lora_model", "text_encoder")
    assert code == 2 and problems[0] == (
        "`preset_lora_model` names `text_encoder`, but `sft:data_process` precomputes the encodings of all samples with it",
        "pass it to `sft:data_process` instead",
    )


def test_a_dataset_in_place_of_encoded_samples(refuse, dataset):
    assert refuse("--task", "sft:train", "--output_path", "run") == (
        2,
        [
            (
                f"`dataset_base_path` `{dataset}` is a dataset, but `sft:train` reads encoded samples",
                "encode it with `--task sft:data_process`, or pass `--task sft`",
            )
        ],
    )


@pytest.mark.parametrize("task", ["sft", "sft:data_process"])
def test_encoded_samples_in_place_of_a_dataset(refuse, encoded, task):
    assert refuse("--task", task, "--dataset_base_path", encoded, "--output_path", "run") == (
        2,
        [
            (
                f"`dataset_base_path` `{encoded}` contains encoded samples, but `{task}` reads images or videos",
                "train on them with `--task sft:train`, or pass the dataset",
            )
        ],
    )


def test_samples_of_another_objective(second, encoded):
    change(encoded, objective="direct_distill")
    assert second() == (
        2,
        [
            (
                f"`{encoded}` was written by `direct_distill:data_process`, but `sft:train` reads the output of `sft:data_process`",
                "pass `--task direct_distill:train`, or encode the dataset with `--task sft:data_process`",
            )
        ],
    )


def test_a_file_that_asks_for_other_samples(second, encoded, config):
    path = config("parameters:\n  max_pixels: 4096\n")
    _, [(message, _)] = second("--config", path)
    assert message == f"`max_pixels` is `4096`, but the samples in `{encoded}` were encoded with `1048576`"


def test_the_sizes_of_encoded_samples_are_told(cli, encoded):
    """Sizes in a recipe apply to both stages, and are overridden by those of the samples."""
    start = ("--task", "sft:train", "--recipe", "qwen-image-lora", "--dataset_base_path", encoded, "--dry_run", "-v")
    assert "precomputed for Qwen-Image, precision no, max_pixels 1048576: " in cli("train", *start).out


@pytest.mark.parametrize(
    ("arguments", "asked", "made"),
    [
        (("--max_pixels", 4096), "`max_pixels` is `4096`", "`1048576`"),
        (("--height", 32, "--width", 32), "`height` is `32`", "blank"),
        (("--extra_inputs", "edit_image"), "`extra_inputs` is `edit_image`", "blank"),
    ],
)
def test_flags_that_ask_for_other_samples(second, encoded, arguments, asked, made):
    code, problems = second(*arguments)
    assert code == 2 and problems[0] == (
        f"{asked}, but the samples in `{encoded}` were encoded with {made}",
        "remove it, or encode them again",
    )


def test_metadata_for_a_second_half(second, dataset):
    assert second("--dataset_metadata_path", dataset / "metadata.csv") == (
        2,
        [("`dataset_metadata_path` has no effect with `sft:train`, which reads no metadata", "remove it")],
    )


def test_a_run_in_the_folder_that_it_reads(second, encoded):
    code, problems = second("--output_path", f"{encoded.parent}/./encoded")
    assert code == 2 and problems == [
        (
            f"`output_path` is the folder `{encoded}` of encoded samples that the run reads",
            "choose another `--output_path`",
        )
    ]


def test_a_first_half_into_a_folder_in_use(refuse, dataset):
    assert refuse(*FIRST, "--output_path", dataset) == (
        2,
        [(f"`output_path` `{dataset}` is not empty and contains no encoded samples", "choose another `--output_path`")],
    )


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--max_pixels", 2048), "`max_pixels` was `1048576`, now it is `2048`"),
        (("--mixed_precision", "bf16"), "`precision` was `no`, now it is `bf16`"),
    ],
)
def test_a_first_half_into_that_of_another(refuse, encoded, arguments, difference):
    assert refuse(*FIRST, "--output_path", encoded, *arguments) == (
        2,
        [
            (
                f"`output_path` `{encoded}` contains samples encoded with other settings: {difference}",
                "choose another `--output_path`, or encode with the same settings",
            )
        ],
    )


def test_a_first_half_with_another_caption(refuse, encoded, dataset):
    metadata = dataset / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("a cat", "a dog"))
    _, [(message, _)] = refuse(*FIRST, "--output_path", encoded)
    assert message == f"`output_path` `{encoded}` contains samples encoded with other settings: the dataset has changed"


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
    assert "the files of the dataset changed since the samples in `out` were encoded" in outcome.err


@pytest.mark.parametrize("half", ["data_process", "train"])
def test_a_half_is_not_rehearsed(refuse, half):
    code, problems = refuse("--task", f"sft:{half}", "--rehearse", "--output_path", "run")
    assert code == 2 and problems[0] == (
        f"`rehearse` rehearses a complete run, but `task` `sft:{half}` is one of two stages",
        "rehearse with `--task sft`",
    )
