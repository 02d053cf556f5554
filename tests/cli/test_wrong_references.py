"""Faulty reference images, and files of FLUX that do not fit together: reported before reading weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_core.models.flux2.keys import DIT_ORIGINAL
from tests.documented_recipes import REFERENCE
from tests.naming import names

EDIT, PLUS, KLEIN = "qwen-image-edit-lora", "qwen-image-edit-2509-lora", "flux.2-klein-4b-lora"
KONTEXT = "flux.1-kontext-dev-lora"
KLEIN_4B, KLEIN_9B = "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9B"
COMPONENTS = ("text_encoder", "dit", "vae")
"""Components of klein, in the order in which recipes list their files."""


@pytest.fixture(scope="session")
def many_models(recipe_models: Callable[..., Path]) -> Path:
    """Tiny models of the recipes used here."""
    return recipe_models(EDIT, PLUS, KLEIN, "flux.2-klein-9b-lora", KONTEXT)


@pytest.fixture
def models(many_models: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(many_models, tmp_path / "models"))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(copy))
    return copy


@pytest.fixture
def pairs(dataset: Path) -> Callable[..., Path]:
    """Write the cells of a column; the first one is a list."""

    def write(*cells: object, column: str = "edit_image") -> Path:
        rows = [{"image": "chelsea.png", "prompt": f"edit {cell}", column: cell} for cell in cells]
        (dataset / "metadata.json").write_text(json.dumps(rows))
        (dataset / "metadata.csv").unlink()
        return dataset / "metadata.json"

    return write


@pytest.mark.parametrize(("recipe", "column"), [(EDIT, "edit_image"), (KONTEXT, "kontext_images")])
def test_a_recipe_without_its_column(refuse, dataset, recipe, column):
    metadata = f"{dataset}/metadata.csv"
    assert refuse(recipe=recipe) == (1, [(names(metadata, "no column", column, "image", "prompt"), "add the column")])


@pytest.mark.parametrize(("recipe", "column"), [(EDIT, "edit_image"), (KONTEXT, "kontext_images")])
def test_a_column_of_images_that_is_not_loaded(refuse, pairs, recipe, column):
    pairs("coffee.png", column=column)
    message = names("data_file_keys", "not include", column)
    assert refuse("--data_file_keys", "image", recipe=recipe) == (
        2,
        [(message, names(f"--data_file_keys image,{column}"))],
    )


def test_a_list_where_one_image_is_allowed(refuse, pairs):
    metadata = pairs("coffee.png", ["coffee.png", "rocket.png"], ["rocket.png"])
    message = names(metadata, "row 2", "edit_image", "2 files")
    assert refuse(recipe=EDIT) == (1, [(message, names("write one row"))])


def test_faulty_images_are_told_together(refuse, pairs, dataset):
    metadata = pairs("coffee.png", "", ["coffee.png", "gone.png"], "text.png", "half.png", "line.png", [])
    (dataset / "text.png").write_text("no image")
    whole = (dataset / "rocket.png").read_bytes()
    (dataset / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (4000, 20)).save(dataset / "line.png")
    code, problems = refuse(recipe=PLUS)
    where = {int(message.split(" row ")[1].partition(":")[0]): message for message, _ in problems}
    assert code == 1 and sorted(where) == [2, 3, 4, 5, 6, 7]
    assert where[2] == names("edit_image", "is empty")
    assert where[3] == names("gone.png", "does not exist")
    assert where[4] == names(f"{dataset}/text.png", "cannot be read")
    assert where[5] == names(f"{dataset}/half.png", "cannot be read")
    assert where[6] == names(f"{dataset}/line.png", "too small")
    assert where[7] == names("edit_image", "is empty")
    assert all(message == names(metadata, "row") and hint for message, hint in problems)


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--zero_cond_t"], "zero_cond_t"), (["--processor_path", "elsewhere"], "processor_path")]
)
def test_parameters_of_images_without_images(refuse, arguments, name):
    message, hint = names(name, "requires", "edit_image"), names("--extra_inputs edit_image")
    assert refuse("--extra_inputs", "", *arguments, recipe=EDIT) == (2, [(message, hint)])


def test_a_caption_without_a_place_is_told_with_its_row(cli, models, pairs, dataset):
    metadata = pairs("coffee.png", "coffee.png")
    rows = json.loads(metadata.read_text())
    rows[1]["prompt"] = "word " * 4000
    metadata.write_text(json.dumps(rows))
    settings = ("--device", "cpu", "--dataset_num_workers", 0, "--max_steps", 2, "--max_pixels", 128 * 128)
    outcome = cli("train", "--recipe", EDIT, "--dataset_base_path", dataset, *settings)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert outcome.err == names("error: row 2", dataset / "chelsea.png", "caption")


def test_a_processor_that_is_not_there(refuse, pairs, tmp_path):
    pairs("coffee.png")
    message = names("no processor", f"{tmp_path}/elsewhere")
    hint = names("--processor_path")
    assert refuse("--processor_path", tmp_path / "elsewhere", recipe=PLUS) == (1, [(message, hint)])


def klein(**changed: str) -> tuple[str, ...]:
    """Return flags for the files of klein 4B, some of them replaced."""
    entries = dict(zip(COMPONENTS, REFERENCE[KLEIN]["model_id_with_origin_paths"], strict=True))
    return ("--model_id_with_origin_paths", ",".join((entries | changed).values()))


def test_klein_with_the_text_encoder_of_dev(refuse, models):
    folder = models / "mine/text_encoder"
    folder.mkdir(parents=True)
    keys = ("language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight")
    save_file({name: torch.zeros(2, 2) for name in keys}, folder / "model.safetensors")
    wrong = "mine:text_encoder/*.safetensors"
    what = names(wrong, "Mistral text encoder", "FLUX.2-dev", "not a component", "FLUX.2")
    hint = names("dit", "text_encoder", "vae")
    assert refuse(*klein(text_encoder=wrong), recipe=KLEIN) == (2, [(what, hint)])


def test_the_text_encoder_of_the_other_klein(refuse, models):
    wrong = f"{KLEIN_9B}:text_encoder/*.safetensors"
    folder = models / KLEIN_9B / "text_encoder"
    for path in folder.glob("*.safetensors"):  # the tiny ones are of one width
        tensors = {
            name: torch.cat([tensor, tensor], -1) if "embed_tokens" in name else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    code, problems = refuse(*klein(text_encoder=wrong), recipe=KLEIN)
    assert code == 2
    assert problems[0][0] == names("text_encoder", wrong, "text states", "64 channels", "dit", "FLUX.2 klein", 32)
    assert problems[0][1] == names("text_encoder", "same model")


def test_the_transformer_of_dev(refuse, models):
    folder = models / KLEIN_4B / "transformer"
    first = sorted(folder.glob("*.safetensors"))[0]
    embedder = {f"time_guidance_embed.guidance_embedder.linear_{number}.weight": torch.zeros(2, 2) for number in (1, 2)}
    save_file(load_file(first) | embedder, first, metadata={"format": "pt"})
    code, problems = refuse(recipe=KLEIN)
    assert code == 2 or code == 1
    message, hint = problems[0]
    assert message == names(f"{KLEIN_4B}:transformer/*.safetensors", "FLUX.2-dev transformer", "not supported")
    assert "klein" in (hint or "")


def test_a_part_of_klein_in_its_other_layout(refuse, models):
    """Its keys are known; missing tensors are reported by module key."""
    whole = [load_file(path) for path in sorted((models / KLEIN_4B / "transformer").glob("*.safetensors"))]
    tensors = {name: tensor for part in whole for name, tensor in part.items()}
    original = {key: DIT_ORIGINAL.fuse(key, tensors).contiguous() for key in DIT_ORIGINAL.to_sources(tensors)}
    del original["img_in.weight"]
    save_file(original, models / KLEIN_4B / "flux-2-klein-4b.safetensors")
    wrong = f"{KLEIN_4B}:flux-2-klein-4b.safetensors"
    ((message, _),) = refuse(*klein(dit=wrong), recipe=KLEIN)[1]
    assert message == names("dit", wrong, "tensor shapes")


def test_a_transformer_without_guidance(refuse, pairs, models):
    pairs("coffee.png", column="kontext_images")
    entry = REFERENCE[KONTEXT]["model_id_with_origin_paths"][0]
    path = models / entry.replace(":", "/")
    save_file({name: tensor for name, tensor in load_file(path).items() if "guidance_in" not in name}, path)
    code, problems = refuse(recipe=KONTEXT)
    assert code != 0 and len(problems) == 1
    assert problems[0][0] == names("no guidance embedder") and "schnell" in problems[0][0] and problems[0][1]


def test_the_transformer_of_the_other_flux(refuse, models):
    wrong = REFERENCE[KONTEXT]["model_id_with_origin_paths"][0]
    what = names(wrong, "transformer of FLUX.1", "not a component", "FLUX.2")
    assert refuse(*klein(dit=wrong), recipe=KLEIN) == (2, [(what, names("dit", "text_encoder", "vae"))])


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("black-forest-labs/FLUX.2-dev:text_encoder/*.safetensors", "FLUX.2-dev"),
        ("black-forest-labs/FLUX.1-Fill-dev:flux1-fill-dev.safetensors", "FLUX.1 Fill"),
        (
            "PAI/Wan2.2-Fun-A14B-Control:low_noise_model/diffusion_pytorch_model*.safetensors",
            "Wan Fun Control (control video)",
        ),
        (
            "PAI/Wan2.2-Fun-A14B-Control-Camera:high_noise_model/diffusion_pytorch_model*.safetensors",
            "Wan Fun Control-Camera (camera control)",
        ),
        (
            "alibaba-pai/Wan2.2-Fun-5B-Camera:diffusion_pytorch_model.safetensors",
            "Wan Fun Control-Camera (camera control)",
        ),
        ("Qwen/Qwen-Image-Layered:transformer/diffusion_pytorch_model*.safetensors", "Qwen-Image-Layered"),
    ],
)
@pytest.mark.parametrize("rehearse", [(), ("--rehearse",)], ids=["run", "rehearsal"])
def test_models_that_are_known_and_not_trained_are_told_without_their_files(refuse, entry, what, rehearse):
    hint = names("diffsynth recipe list")
    assert refuse(
        "--model_id_with_origin_paths", f"{entry},{entry}", "--lora_base_model", "dit", *rehearse, recipe=None
    ) == (2, [(names(entry, what, "not supported"), hint)])


def test_tokenizers_of_other_models(refuse, pairs, models):
    pairs("coffee.png", column="kontext_images")
    dev = models / "black-forest-labs/FLUX.1-dev"
    t5 = json.loads((dev / "tokenizer_2/tokenizer.json").read_text())
    t5["model"]["vocab"] += [[f"more{number}", -9.0] for number in range(4000)]
    umt5 = models / "umt5"
    umt5.mkdir()
    (umt5 / "tokenizer.json").write_text(json.dumps(t5))
    code, problems = refuse(*("--tokenizer_1_path", dev / "tokenizer_2", "--tokenizer_2_path", umt5), recipe=KONTEXT)
    (clip, clip_hint), (large, large_hint) = problems
    what = names(f"{dev}/tokenizer_2/tokenizer.json", "not the CLIP tokenizer", "text_encoder_1")
    assert (code, clip) == (1, names(what, "Unigram", "BPE"))
    assert large == names(f"{umt5}/tokenizer.json", "not the T5 tokenizer", "text_encoder_2")
    assert large_hint == names("--tokenizer_2_path")
    assert clip_hint == names("--tokenizer_1_path")


def test_one_tokenizer_for_a_family_of_two(refuse, pairs):
    pairs("coffee.png", column="kontext_images")
    code, problems = refuse("--tokenizer_path", "anywhere", recipe=KONTEXT)
    assert code == 2 and len(problems) == 1
    assert "`tokenizer_path`" in problems[0][0]


def test_a_transformer_that_is_not_there_without_a_recipe(refuse, models):
    entries = klein(dit="black-forest-labs/FLUX.2-klein-4B:elsewhere/*.safetensors")
    ((message, _),) = refuse(*entries, "--lora_base_model", "dit", recipe=None)[1]
    assert message == names("nothing matches", "black-forest-labs/FLUX.2-klein-4B:elsewhere/*.safetensors")


def test_a_file_in_place_of_another_is_one_mistake(refuse, models):
    """Its name does not show which component it was meant to be, so the missing component is not reported."""
    save_file({"a.weight": torch.zeros(2)}, models / KLEIN_4B / "mine.safetensors")
    wrong = f"{KLEIN_4B}:mine.safetensors"
    ((message, _),) = refuse(*klein(text_encoder=wrong), recipe=KLEIN)[1]
    assert message == names(wrong, "not a component", "FLUX.2", "a.weight")


def test_an_entry_that_is_named_twice_is_one_mistake(refuse, models):
    encoder = klein()[1].split(",")[0]
    ((message, _),) = refuse(*klein(dit=encoder), recipe=KLEIN)[1]
    assert message == names(encoder, "twice", "text_encoder", "FLUX.2") and message.count(encoder) == 1
