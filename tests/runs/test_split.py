"""Two-stage training in every family: the train task gives the result of a single-stage run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from diffsynth_core.data.encoded_samples import read_encoded, write_encoded
from tests.kinds import KINDS, Kind, component_of, entries_of, inputs_of, lora, write_datasets, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, photographs) -> dict[str, Path]:
    return write_datasets(tmp_path_factory.mktemp("split"), photographs)


@pytest.fixture
def train(cli, models, monkeypatch, tmp_path) -> Callable[..., object]:
    """Run `diffsynth train` with the tiny models and a cache for this test."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(models))

    def run(*arguments: object, code: int = 0):
        outcome = cli("train", "--device", "cpu", "--cache_path", tmp_path / "own_cache", *arguments)
        assert outcome.code == code, outcome.err
        return outcome

    return run


def losses_of(folder: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def tensor_bytes(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - it is no dict


def precompute_task(kind: Kind, dataset: Path, folder: str, objective: str = "sft") -> tuple[object, ...]:
    """Return the precompute command as in scripts: without the transformer, with the LoRA's flags."""
    files = [entry for entry in entries_of(kind.recipe) if component_of(kind.recipe, entry) != "dit"]
    reported = ("--processor_path", "Qwen/Qwen-Image-Edit:processor") if kind.recipe == "qwen-image-edit-lora" else ()
    return (
        *(
            "--task",
            f"{objective}:data_process",
            "--model_id_with_origin_paths",
            ",".join(files),
            *inputs_of(kind),
            *reported,
        ),
        *(*kind.sizes, *lora(kind), "--dataset_base_path", dataset, "--output_path", folder),
    )


def train_task(kind: Kind, cache: str, folder: str, *more: object, objective: str = "sft") -> tuple[object, ...]:
    """Return the train command, with the transformer only."""
    return (
        *("--task", f"{objective}:train", "--model_id_with_origin_paths", entries_of(kind.recipe)[0], *lora(kind)),
        *("--dataset_base_path", cache, "--output_path", folder, *more),
    )


HOW = (
    "--lora_rank",
    4,
    "--learning_rate",
    0.003,
    "--dataset_repeat",
    3,
    "--num_epochs",
    1,
    "--batch_size",
    2,
    "--seed",
    7,
)


DISTILLED = {"qwen-image": pytest.mark.long, "flux": pytest.mark.long, "flux2": pytest.mark.long, "wan-ti2v": ()}
"""What distillation adds, the columns of the sampler, is the same in all families: one is enough."""
OTHERS_DO = ("qwen-image", "qwen-edit", "wan-t2v")
"""Kinds all of whose encoders other kinds have too, or nearly."""
ROADS = [
    *(pytest.param(name, "sft", marks=pytest.mark.long if name in OTHERS_DO else ()) for name in KINDS),
    *(pytest.param(name, "direct_distill", marks=marks) for name, marks in DISTILLED.items()),
]


@pytest.mark.parametrize(("name", "objective"), ROADS)
def test_the_halves_train_what_the_whole_does(name, objective, train, datasets, tmp_path):
    kind = KINDS[name]
    dataset = Path(shutil.copytree(datasets[kind.data], tmp_path / "dataset"))
    first = train(*precompute_task(kind, dataset, "encoded", objective))
    assert "Loading dit" not in first.err and "\n  dit " not in first.err
    assert [f"Loading {component} (" in first.err for component in kind.components] == [True] * len(kind.components)
    whole = ("--task", objective, "--model_id_with_origin_paths", ",".join(entries_of(kind.recipe)), *inputs_of(kind))
    train(*whole, *kind.sizes, *lora(kind), "--dataset_base_path", dataset, "--output_path", "whole", *HOW)
    shutil.rmtree(dataset)
    shutil.rmtree(tmp_path / "own_cache" / "encodings")
    second = train(*train_task(kind, "encoded", "halves", *HOW, objective=objective))
    # A slow machine tells more than once how far a component is.
    assert {line.split()[1] for line in second.err.splitlines() if line.startswith("Loading ")} == {"dit"}
    expected, found = losses_of("whole"), losses_of("halves")
    difference = max(abs(one - other) for one, other in zip(expected, found, strict=True))
    files = set(Path("encoded/encodings").rglob("*.safetensors"))
    assert {path.parents[1].name for path in files} == set(kind.encoders)
    ratio = sum(path.stat().st_size for path in Path("encoded").rglob("*") if path.is_file()) / sum(
        map(tensor_bytes, files)
    )
    print(
        f"\n{name} {objective}: {len(found)} steps, largest difference of losses {difference:g}, bytes by tensors' {ratio:.4f}"
    )
    assert len(found) > 3 and difference < 1e-6
    assert ratio <= 1.1


QWEN = KINDS["qwen-image"]


def manifest_of(folder: str) -> dict:
    return json.loads(Path(folder, "encoded.json").read_text())


def test_the_empty_caption_is_encoded_with_each_image_that_a_text_encoder_reads(train, datasets):
    """Here all rows have the same one."""
    kind, dropped = KINDS["qwen-edit"], ("--caption_dropout", 0.5)
    train(*precompute_task(kind, datasets[kind.data], "encoded"), *dropped)
    entries = manifest_of("encoded")["samples"]
    without = {key for entry in entries for key, _ in entry["others"]["edit_text"]}
    assert len(without) == 1 and {len(entry["others"]) for entry in entries} == {1}
    assert len(list(Path("encoded/encodings/edit_text").rglob("*.safetensors"))) == len(entries) + 1
    train(*train_task(kind, "encoded", "run", *dropped, "--max_steps", 4))
    assert len(losses_of("run")) == 4


def test_a_first_half_that_names_the_transformer_does_not_load_it(train, datasets):
    command = ("--recipe", QWEN.recipe, "--task", "sft:data_process", "--dataset_base_path", datasets["images"])
    planned = train(*command, "--output_path", "encoded", "--dry_run", "--verbose")
    assert f"  dit             {entries_of(QWEN.recipe)[0]}, not loaded by `sft:data_process`\n" in planned.out
    assert "4 samples from" in planned.out and "\nSteps " not in planned.out and not Path("encoded").exists()
    done = train(*command, "--output_path", "encoded")
    assert "Loading dit" not in done.err
    assert set(manifest_of("encoded")["origin"]["components"]) == {"text_encoder", "vae"}
    assert "Encoded     encoded (4 samples, " in done.out


def test_what_the_cache_holds_is_not_encoded_again(train, datasets):
    train("--recipe", QWEN.recipe, "--dataset_base_path", datasets["images"], "--max_steps", 2, "--output_path", "run")
    partly = train(*precompute_task(QWEN, datasets["images"], "partly"))
    encoded = int(partly.err.rpartition("Encoding latents: ")[2].partition(" of")[0])
    assert encoded == 2, "a run of two steps encodes two samples"
    train(
        "--recipe",
        QWEN.recipe,
        "--dataset_base_path",
        datasets["images"],
        "--num_epochs",
        1,
        "--dataset_repeat",
        1,
        "--output_path",
        "all",
    )
    wholly = train(*precompute_task(QWEN, datasets["images"], "wholly"))
    assert "Loading" not in wholly.err
    assert "All 4 samples are already encoded: no encoder is loaded" in wholly.err
    assert all(path.stat().st_nlink > 1 for path in Path("wholly/encodings").rglob("*.safetensors")), "not copied"


def test_a_stopped_first_half_goes_on_where_it_stopped(train, datasets, monkeypatch):
    from diffsynth_core.planning.data import encoder_inputs

    real, calls = encoder_inputs.load_pixel_tensor, []

    def failing(crop):
        calls.append(crop.path)
        if len(calls) == 3:
            raise MemoryError("as the system would")
        return real(crop)

    monkeypatch.setattr(encoder_inputs, "load_pixel_tensor", failing)
    train(*precompute_task(QWEN, datasets["images"], "encoded"), code=1)
    assert not manifest_of("encoded")["complete"]
    monkeypatch.setattr(encoder_inputs, "load_pixel_tensor", real)
    refused = train(*train_task(QWEN, "encoded", "run"), code=1)
    assert "precomputation in `encoded` did not finish: `sft:data_process` was interrupted" in refused.err
    going_on = train(*precompute_task(QWEN, datasets["images"], "encoded"))
    assert "Encoding latents: 2 of 2 samples" in going_on.err and "Loading text_encoder" not in going_on.err
    again = train(*precompute_task(QWEN, datasets["images"], "encoded"))
    assert "All 4 samples are already encoded" in again.err and "Loading" not in again.err
    train(*train_task(QWEN, "encoded", "run", "--max_steps", 1))


def test_a_second_half_goes_on_where_it_stopped(train, datasets):
    train(*precompute_task(QWEN, datasets["images"], "encoded"))
    train(*train_task(QWEN, "encoded", "straight", *HOW, "--save_steps", 3))
    train(*train_task(QWEN, "encoded", "run", *HOW, "--save_steps", 3, "--max_steps", 3))
    train(*train_task(QWEN, "encoded", "run", *HOW, "--save_steps", 3, "--resume", "auto"))
    assert losses_of("run") == losses_of("straight")
    record, other = (json.loads(Path(folder, "run.json").read_text()) for folder in ("run", "straight"))
    assert [entry["sha256"] for entry in record["checkpoints"]] == [entry["sha256"] for entry in other["checkpoints"]]
    manifest = manifest_of("encoded")
    assert record["dataset_fingerprint"] == manifest["origin"]["dataset_fingerprint"]
    assert set(record["components"]) == {"dit", "text_encoder", "vae"}
    assert record["components"]["vae"] == manifest["origin"]["components"]["vae"]


def test_a_run_is_not_resumed_on_samples_encoded_by_another_vae(train, datasets):
    train(*precompute_task(QWEN, datasets["images"], "encoded"))
    train(*train_task(QWEN, "encoded", "run", *HOW, "--save_steps", 1, "--max_steps", 1))
    found = read_encoded(Path("encoded"))
    components = {**found.origin.components, "vae": {"vae/diffusion_pytorch_model.safetensors": "0" * 64}}
    write_encoded(replace(found, origin=replace(found.origin, components=components)))
    outcome = train(*train_task(QWEN, "encoded", "run", *HOW, "--save_steps", 1, "--resume", "auto"), code=1)
    assert "the files of vae changed since the run in `run` started" in outcome.err


@pytest.mark.long
def test_two_processes_share_the_encoding_out(train, models, datasets, tmp_path):
    """Each sample is encoded once, and the folder equals that of a single process."""
    alone = train(*precompute_task(QWEN, datasets["images"], "by_1"))
    command = ["-m", "diffsynth_cli", "train", "--device", "cpu", "--num_processes", 2]
    command += [*precompute_task(QWEN, datasets["images"], "by_2"), "--cache_path", tmp_path / "other_cache"]
    environment = os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(models), "OMP_NUM_THREADS": "1"}
    shared = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert shared.returncode == 0, shared.stderr
    assert (alone.out.count("Encoded     "), shared.stdout.count("Encoded     ")) == (1, 1)
    assert "Encoding latents: 4 of 4 samples" in alone.err and "Encoding latents: 2 of 2 samples" in shared.stderr
    folders = [
        {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        for folder in ("by_1", "by_2")
    ]
    assert folders[0] == folders[1]


@pytest.mark.parametrize("name", ["qwen-image", "flux", "wan-i2v"])
def test_each_half_needs_its_own_files_alone(name, train, datasets, models, tmp_path, monkeypatch):
    """The recipe names all files; the encoding machine has no transformer, the training machine has nothing else."""
    kind = KINDS[name]
    transformer, *others = entries_of(kind.recipe)
    bases = {"first": Path(shutil.copytree(models, tmp_path / "first")), "second": tmp_path / "second"}
    model_id, _, place = transformer.partition(":")
    (bases["second"] / model_id / place).parent.mkdir(parents=True)
    for path in (bases["first"] / model_id).glob(place):
        shutil.move(path, (bases["second"] / model_id / place).parent)
    command = ("--recipe", kind.recipe, *kind.sizes, "--dataset_repeat", 1, "--num_epochs", 1)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(bases["first"]))
    train(
        *command, "--task", "sft:data_process", "--dataset_base_path", datasets[kind.data], "--output_path", "encoded"
    )
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(bases["second"]))
    train(*command, "--task", "sft:train", "--dataset_base_path", "encoded", "--output_path", "out", "--lora_rank", 2)
    assert set(manifest_of("encoded")["origin"]["components"]) == set(kind.components)
    assert Path("out/epoch-0.safetensors").is_file() and others
