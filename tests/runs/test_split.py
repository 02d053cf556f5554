"""The two halves of split training, of every family: the second trains what a whole run would train."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from safetensors import safe_open

from diffsynth_core.config.recipes import load_recipe
from diffsynth_core.data.encoded_samples import read_encoded, write_encoded
from diffsynth_core.families.table import FAMILIES, component_at, load_family
from tests.clips import detailed, write_clip
from tests.conftest import CAPTIONS

CLIPS = ("--height", 64, "--width", 96, "--num_frames", 9)


@dataclass(frozen=True)
class Kind:
    """A kind of model: the recipe whose files it is, the dataset it needs, and flags of both halves' road."""

    recipe: str
    data: str = "pictures"
    sizes: tuple[object, ...] = ()
    encoders: tuple[str, ...] = ("text", "latents")
    components: tuple[str, ...] = field(default=("text_encoder", "vae"))


KINDS = {
    "qwen-image": Kind("qwen-image-lora"),
    "qwen-edit": Kind("qwen-image-edit-lora", "edits", encoders=("edit_text", "latents", "edit_latents")),
    "qwen-edit-2509": Kind(
        "qwen-image-edit-2509-lora", "edits", encoders=("edit_plus_text", "latents", "edit_latents")
    ),
    "flux": Kind(
        "flux.1-dev-lora",
        encoders=("text_1", "text_2", "latents"),
        components=("text_encoder_1", "text_encoder_2", "vae"),
    ),
    "flux2": Kind("flux.2-klein-base-4b-lora"),
    "wan-t2v": Kind("wan2.1-t2v-1.3b-lora", "clips", CLIPS),
    "wan-i2v": Kind(
        "wan2.1-i2v-14b-480p-lora",
        "clips",
        CLIPS,
        ("text", "latents_with_condition", "image"),
        ("text_encoder", "vae", "image_encoder"),
    ),
    "wan-ti2v": Kind("wan2.2-ti2v-5b-lora", "clips", CLIPS, ("text", "latents_with_first_given")),
}


def entries_of(recipe: str) -> list[str]:
    """The model entries of a recipe, the transformer's first."""
    (layer,) = [layer for layer in load_recipe(recipe).layers if "model_id_with_origin_paths" in layer.parameters][-1:]
    entries = list(layer.parameters["model_id_with_origin_paths"])
    return sorted(entries, key=lambda entry: component_of(recipe, entry) != "dit")


def component_of(recipe: str, entry: str) -> str:
    return component_at(entry.partition(":")[2], FAMILIES[load_recipe(recipe).family]).name


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A model base path with tiny models of every kind."""
    base = tmp_path_factory.mktemp("models")
    written = set()
    for recipe in {kind.recipe for kind in KINDS.values()}:
        for entry in entries_of(recipe):
            model_id, _, place = entry.partition(":")
            if entry not in written:
                family = load_family(load_recipe(recipe).family)
                family.write_tiny_weights(base, component_of(recipe, entry), model_id, place)
                written.add(entry)
    return base


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, photographs) -> dict[str, Path]:
    """Photographs of two shapes, the same with pictures to edit, and clips of two lengths."""
    import skimage.data
    from PIL import Image

    pictures = Path(shutil.copytree(photographs, tmp_path_factory.mktemp("split") / "pictures"))
    Image.fromarray(skimage.data.coffee()).resize((96, 64)).save(pictures / "coffee.png")
    edits = Path(shutil.copytree(pictures, pictures.with_name("edits")))
    rows = [f'{name}.png,chelsea.png,"{caption}"' for name, caption in CAPTIONS.items()]
    (edits / "metadata.csv").write_text("\n".join(["image,edit_image,prompt", *rows]) + "\n")
    clips = pictures.with_name("clips")
    clips.mkdir()
    for name, frames in (("a.mp4", 9), ("b.mov", 9), ("c.mkv", 5)):
        write_clip(clips / name, detailed(frames, 64, 96))
    (clips / "metadata.csv").write_text("video,prompt\na.mp4,one\nb.mov,two and three\nc.mkv,short\n")
    return {"pictures": pictures, "edits": edits, "clips": clips}


@pytest.fixture
def train(cli, models, monkeypatch, tmp_path) -> Callable[..., object]:
    """`diffsynth train` with the tiny models, and a cache of this test's own."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(models))

    def run(*arguments: object, code: int = 0):
        outcome = cli("train", "--device", "cpu", "--cache_path", tmp_path / "own_cache", *arguments)
        assert outcome.code == code, outcome.err
        return outcome

    return run


def lora(kind: Kind) -> tuple[object, ...]:
    (targets,) = [
        component.lora_targets
        for component in FAMILIES[load_recipe(kind.recipe).family].components
        if component.lora_targets
    ]
    return (
        "--lora_base_model",
        "dit",
        "--lora_target_modules",
        ",".join(targets),
        "--remove_prefix_in_ckpt",
        "pipe.dit.",
    )


def inputs_of(kind: Kind) -> tuple[object, ...]:
    """The extra inputs of a kind, and the columns that it reads."""
    columns = {"edits": ("--extra_inputs", "edit_image", "--data_file_keys", "image,edit_image")}
    shown = ("--extra_inputs", "input_image") if "input_image" in str(load_recipe(kind.recipe).layers) else ()
    return columns.get(kind.data, shown)


def losses_of(folder: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def tensor_bytes(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - it is no dict


def first_half(kind: Kind, dataset: Path, folder: str) -> tuple[object, ...]:
    """The command of the first half, as scripts write it: without the transformer, with the LoRA's flags."""
    files = [entry for entry in entries_of(kind.recipe) if component_of(kind.recipe, entry) != "dit"]
    told = ("--processor_path", "Qwen/Qwen-Image-Edit:processor") if kind.recipe == "qwen-image-edit-lora" else ()
    return (
        *("--task", "sft:data_process", "--model_id_with_origin_paths", ",".join(files), *inputs_of(kind), *told),
        *(*kind.sizes, *lora(kind), "--dataset_base_path", dataset, "--output_path", folder),
    )


def second_half(kind: Kind, cache: str, folder: str, *more: object) -> tuple[object, ...]:
    """The command of the second half: the transformer alone."""
    return (
        *("--task", "sft:train", "--model_id_with_origin_paths", entries_of(kind.recipe)[0], *lora(kind)),
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


@pytest.mark.parametrize("name", KINDS)
def test_the_halves_train_what_the_whole_does(name, train, datasets, tmp_path):
    kind = KINDS[name]
    dataset = Path(shutil.copytree(datasets[kind.data], tmp_path / "dataset"))
    first = train(*first_half(kind, dataset, "encoded"))
    assert "Loading dit" not in first.err and "\n  dit " not in first.err
    assert [f"Loading {component} (" in first.err for component in kind.components] == [True] * len(kind.components)
    whole = ("--task", "sft", "--model_id_with_origin_paths", ",".join(entries_of(kind.recipe)), *inputs_of(kind))
    train(*whole, *kind.sizes, *lora(kind), "--dataset_base_path", dataset, "--output_path", "whole", *HOW)
    shutil.rmtree(dataset)
    shutil.rmtree(tmp_path / "own_cache" / "encodings")
    second = train(*second_half(kind, "encoded", "halves", *HOW))
    assert second.err.count("Loading ") == 1 and "Loading dit (" in second.err
    expected, found = losses_of("whole"), losses_of("halves")
    difference = max(abs(one - other) for one, other in zip(expected, found, strict=True))
    files = set(Path("encoded/encodings").rglob("*.safetensors"))
    assert {path.parents[1].name for path in files} == set(kind.encoders)
    ratio = sum(path.stat().st_size for path in Path("encoded").rglob("*") if path.is_file()) / sum(
        map(tensor_bytes, files)
    )
    print(f"\n{name}: {len(found)} steps, largest difference of losses {difference:g}, bytes by tensors' {ratio:.4f}")
    assert len(found) > 3 and difference < 1e-6
    assert ratio <= 1.1


QWEN = KINDS["qwen-image"]


def manifest_of(folder: str) -> dict:
    return json.loads(Path(folder, "encoded.json").read_text())


def test_a_first_half_that_names_the_transformer_does_not_load_it(train, datasets):
    command = ("--recipe", QWEN.recipe, "--task", "sft:data_process", "--dataset_base_path", datasets["pictures"])
    planned = train(*command, "--output_path", "encoded", "--dry_run")
    assert f"  dit            {entries_of(QWEN.recipe)[0]}, not loaded by `sft:data_process`\n" in planned.out
    assert "4 samples from" in planned.out and "steps" not in planned.out and not Path("encoded").exists()
    done = train(*command, "--output_path", "encoded")
    assert "Loading dit" not in done.err
    assert set(manifest_of("encoded")["origin"]["components"]) == {"text_encoder", "vae"}
    assert "Encoded     encoded (4 samples, " in done.out


def test_what_the_cache_holds_is_not_encoded_again(train, datasets):
    train(
        "--recipe", QWEN.recipe, "--dataset_base_path", datasets["pictures"], "--max_steps", 2, "--output_path", "run"
    )
    partly = train(*first_half(QWEN, datasets["pictures"], "partly"))
    encoded = int(partly.err.partition("Encoding latents: ")[2].partition(" of")[0])
    assert encoded == 2, "a run of two steps encodes two samples"
    train(
        "--recipe",
        QWEN.recipe,
        "--dataset_base_path",
        datasets["pictures"],
        "--num_epochs",
        1,
        "--dataset_repeat",
        1,
        "--output_path",
        "all",
    )
    wholly = train(*first_half(QWEN, datasets["pictures"], "wholly"))
    assert "Loading" not in wholly.err
    assert "All 4 samples are encoded already: no encoder is loaded" in wholly.err
    assert {path.stat().st_nlink for path in Path("wholly/encodings").rglob("*.safetensors")} == {2}


def test_a_stopped_first_half_goes_on_where_it_stopped(train, datasets, monkeypatch):
    from diffsynth_core.training import encode

    real, calls = encode.load_pixels, []

    def failing(excerpt):
        calls.append(excerpt.path)
        if len(calls) == 3:
            raise MemoryError("as the system would")
        return real(excerpt)

    monkeypatch.setattr(encode, "load_pixels", failing)
    train(*first_half(QWEN, datasets["pictures"], "encoded"), code=1)
    assert not manifest_of("encoded")["complete"]
    monkeypatch.setattr(encode, "load_pixels", real)
    refused = train(*second_half(QWEN, "encoded", "run"), code=1)
    assert "`encoded` is not complete: `sft:data_process` was stopped while it encoded" in refused.err
    going_on = train(*first_half(QWEN, datasets["pictures"], "encoded"))
    assert "Encoding latents: 2 of 2 samples" in going_on.err and "Loading text_encoder" not in going_on.err
    again = train(*first_half(QWEN, datasets["pictures"], "encoded"))
    assert "All 4 samples are encoded already" in again.err and "Loading" not in again.err
    train(*second_half(QWEN, "encoded", "run", "--max_steps", 1))


def test_a_second_half_goes_on_where_it_stopped(train, datasets):
    train(*first_half(QWEN, datasets["pictures"], "encoded"))
    train(*second_half(QWEN, "encoded", "straight", *HOW, "--save_steps", 3))
    train(*second_half(QWEN, "encoded", "run", *HOW, "--save_steps", 3, "--max_steps", 3))
    train(*second_half(QWEN, "encoded", "run", *HOW, "--save_steps", 3, "--resume", "auto"))
    assert losses_of("run") == losses_of("straight")
    record, other = (json.loads(Path(folder, "run.json").read_text()) for folder in ("run", "straight"))
    assert [entry["sha256"] for entry in record["checkpoints"]] == [entry["sha256"] for entry in other["checkpoints"]]
    manifest = manifest_of("encoded")
    assert record["dataset_fingerprint"] == manifest["origin"]["dataset_fingerprint"]
    assert set(record["components"]) == {"dit", "text_encoder", "vae"}
    assert record["components"]["vae"] == manifest["origin"]["components"]["vae"]


def test_a_run_is_not_resumed_on_samples_encoded_by_another_vae(train, datasets):
    train(*first_half(QWEN, datasets["pictures"], "encoded"))
    train(*second_half(QWEN, "encoded", "run", *HOW, "--save_steps", 1, "--max_steps", 1))
    found = read_encoded(Path("encoded"))
    components = {**found.origin.components, "vae": {"vae/diffusion_pytorch_model.safetensors": "0" * 64}}
    write_encoded(replace(found, origin=replace(found.origin, components=components)))
    outcome = train(*second_half(QWEN, "encoded", "run", *HOW, "--save_steps", 1, "--resume", "auto"), code=1)
    assert "the files of vae are not those the run in `run` was started with" in outcome.err


def test_two_processes_share_the_encoding_out(models, datasets, tmp_path):
    """Each sample is encoded once, and the folder is the one that a single process writes."""
    folders = {}
    for count in (1, 2):
        command = ["-m", "diffsynth_cli", "train", "--device", "cpu", "--num_processes", count]
        command += [*first_half(QWEN, datasets["pictures"], f"by_{count}"), "--cache_path", tmp_path / f"cache_{count}"]
        environment = os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(models), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Encoded     ") == 1
        assert f"Encoding latents: {4 // count} of {4 // count} samples" in done.stderr
        folder = tmp_path / f"by_{count}"
        folders[count] = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert folders[1] == folders[2]
