"""Full checkpoints for other programs: folders that `from_pretrained` opens, and files that ComfyUI reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.shapes import layers_of_blocks
from diffsynth_core.weights.base_files import read_parts
from diffsynth_core.weights.tensors import dequantize, iterate_weights
from tests.checkpoints import REHEARSED, rehearse
from tests.cli.conftest import read_problems, stamps
from tests.conftest import MODEL_ID

FOLDERS = {
    "qwen-image": {
        "text_encoder": ("text_encoder", "transformers:Qwen2_5_VLForConditionalGeneration"),
        "controlnet": ("controlnet", "diffusers:QwenImageControlNetModel"),
    },
    "flux": {
        "text_encoder_1": ("text_encoder", "transformers:CLIPTextModel"),
        "text_encoder_2": ("text_encoder_2", "transformers:T5EncoderModel"),
        "vae": ("vae", "diffusers:AutoencoderKL"),
        "controlnet": ("controlnet", "diffusers:FluxControlNetModel"),
    },
    "flux, nothing removed": {
        "dit": ("transformer", "diffusers:FluxTransformer2DModel"),
        "text_encoder_1": ("text_encoder", "transformers:CLIPTextModel"),
    },
    "flux2": {
        "text_encoder": ("text_encoder", "transformers:Qwen3ForCausalLM"),
        "vae": ("vae", "diffusers:AutoencoderKLFlux2"),
    },
    "wan, nothing removed": {
        "text_encoder": ("text_encoder", "transformers:UMT5EncoderModel"),
        "vae": ("vae", "diffusers:AutoencoderKLWan"),
    },
    "wan, image to video": {
        "image_encoder": ("image_encoder", "transformers:CLIPVisionModel"),
        "dit": ("transformer", "diffusers:WanTransformer3DModel"),
    },
}
"""Rehearsal -> component -> its folder, and the class that opens it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return rehearse(tmp_path_factory.mktemp("rehearsed"))


def class_of(name):
    import importlib

    library, _, member = name.partition(":")
    return getattr(importlib.import_module(library), member)


def configs(name, tiny_models):
    """Shapes do not determine the heads of Qwen2.5-VL."""
    return ("--config", f"text_encoder={tiny_models / MODEL_ID / 'text_encoder'}") if name == "qwen-image" else ()


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # by diffusers, within diffusers
@pytest.mark.parametrize("name", FOLDERS)
def test_from_pretrained_opens_the_folders(cli, checkpoint, tiny_models, name):
    """With all tensors of the checkpoint, bit for bit, in one file or in shards."""
    path, family = checkpoint(name), load_family(REHEARSED[name].family)
    assert cli("split-ckpt", path, "--output_path", "plain", "--layout", "diffusers").code == 0
    sized = ("--max_shard_size", "100kB", *configs(name, tiny_models))
    for output, more in {"parts": configs(name, tiny_models), "shards": sized}.items():
        outcome = cli("split-ckpt", path, "--output_path", output, "--layout", "pretrained", *more)
        assert outcome.code == 0, outcome.err
        for component, (folder, reader) in FOLDERS[name].items():
            assert (Path(output, folder, "config.json").is_file()) and "config" in outcome.out
            loaded, info = class_of(reader).from_pretrained(
                Path(output, folder), output_loading_info=True, local_files_only=True
            )
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            expected, state = load_file(f"plain/{component}.safetensors"), loaded.state_dict()
            assert expected and all(torch.equal(state[key], expected[key]) for key in expected)
        assert bool(list(Path(output).glob("*/*.index.json"))) == (output == "shards")
    assert family.facts.name == REHEARSED[name].family


def test_a_folder_computes_what_the_run_trained(cli, trained_in_full, tiny_models, monkeypatch):
    """The config.json of the run's base model is found; diffusers' module gives the velocity of the run's own."""
    from diffusers import QwenImageTransformer2DModel

    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    outcome = cli("split-ckpt", trained_in_full, "--output_path", "parts", "--layout", "pretrained")
    assert outcome.code == 0 and "inferred" not in outcome.err
    module = QwenImageTransformer2DModel.from_pretrained("parts/transformer", local_files_only=True).float().eval()
    base = json.loads((tiny_models / MODEL_ID / "transformer/config.json").read_text())
    assert all(module.config[key] == value for key, value in base.items() if not key.startswith("_"))
    family = load_family("qwen-image")
    own = family.build("dit", base)
    own.load_state_dict(load_file(trained_in_full))
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, base["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, base["joint_attention_dim"], generator=generator),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    with torch.no_grad():
        assert torch.equal(module(**inputs).sample, own.float().eval()(**inputs).sample)


@pytest.fixture(scope="module")
def trained_in_full(tiny_models, photographs, tmp_path_factory):
    """The checkpoint of a full training of the tiny transformer."""
    from diffsynth_cli.main import main

    output = tmp_path_factory.mktemp("full") / "run"
    flags = ("--max_steps", "1", "--dataset_num_workers", "0", "--device", "cpu", "--max_pixels", "1024")
    data = ("--dataset_base_path", str(photographs), "--output_path", str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
        assert main(["train", "--recipe", "qwen-image-full", *flags, *data]) == 0
    return output / "epoch-0.safetensors"


COMFYUI = {name: [*FOLDERS[name]] for name in ("flux, nothing removed", "wan, image to video")}
COMFYUI["wan, image to video"].remove("image_encoder")


def test_a_comfyui_file_in_scaled_fp8_reads_back(cli, trained_in_full):
    """Each weight within the stated error, half the bytes of bfloat16, and read as a base by the tool itself."""
    split = ("split-ckpt", trained_in_full, "--output_path", "parts", "--layout", "comfyui", "--dtype", "fp8_scaled")
    outcome = cli(*split)
    assert outcome.code == 0, outcome.err
    original, written = load_file(trained_in_full), load_file("parts/dit.safetensors")
    layers = layers_of_blocks({name: tuple(tensor.shape) for name, tensor in original.items()})
    scales = {f"{layer}.scale_weight" for layer in layers}
    assert written.keys() == {*original, *scales, "scaled_fp8"} and written["scaled_fp8"].shape == (0,)
    assert f"{len(layers)} layers of dit in 8-bit floats" in outcome.err
    (part,) = read_parts([Path("parts/dit.safetensors")])
    read = {
        name: stored if scale is None else dequantize(stored, scale) for name, stored, scale in iterate_weights(part)
    }
    squared = whole = 0.0
    for name, weight in original.items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(written[name], weight) and written[name].dtype == weight.dtype
            continue
        assert (
            written[name].dtype == torch.float8_e4m3fn and written[name.replace(".weight", ".scale_weight")].shape == ()
        )
        exact = weight.float()
        allowed = torch.maximum(exact.abs() / 16, exact.abs().max() / 400_000)
        assert bool(((read[name] - exact).abs() <= allowed).all())
        squared, whole = squared + float((read[name] - exact).square().sum()), whole + float(exact.square().sum())
    assert 0.01 < (squared / whole) ** 0.5 < 0.03  # of a uniform relative error of 1/16 at most
    assert sum(written[f"{layer}.weight"].nbytes for layer in layers) * 2 == sum(
        original[f"{layer}.weight"].nbytes for layer in layers
    )


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_files_have_the_original_names(cli, checkpoint, name):
    rehearsed = REHEARSED[name]
    split = ("split-ckpt", checkpoint(name), "--output_path")
    wrong = [component for component in rehearsed.full if component not in COMFYUI[name]]
    outcome = cli(*split, "parts", "--layout", "comfyui")
    if wrong:
        title = FAMILIES[rehearsed.family].title
        assert outcome.code == 1 and f"ComfyUI's names of the component `{wrong[0]}` of {title}" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    assert cli(*split, "original", "--layout", "original").code == 0
    for component in rehearsed.full:
        one, other = (load_file(f"{folder}/{component}.safetensors") for folder in ("parts", "original"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_dtypes(cli, trained_in_full, dtype):
    assert cli("split-ckpt", trained_in_full, "--output_path", "parts", "--dtype", dtype).code == 0
    original, written = load_file(trained_in_full), load_file("parts/dit.safetensors")
    assert original.keys() == written.keys()
    assert all(torch.equal(written[key], original[key].to(getattr(torch, dtype))) for key in original)


@pytest.fixture
def refuse(cli, says):
    """Run a command that must be rejected without writing anything; return its problems."""

    def run(*arguments):
        before = stamps(Path())
        outcome = cli("split-ckpt", *arguments, "--output_path", "parts")
        assert outcome.code in (1, 2) and outcome.out == "" and stamps(Path()) == before, outcome.err
        says(f"exit code {outcome.code}\n{outcome.err}")
        return read_problems(outcome.err)

    return run


def copied(path, **changes):
    """A copy of a checkpoint in the working folder, with some tensors changed; None: removed."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, "full.safetensors")
    return "full.safetensors"


NORM = "transformer_blocks.0.attn.norm_q.weight"
LINEAR = "transformer_blocks.0.attn.to_q.weight"


def test_what_is_wrong_is_one_report(refuse, trained_in_full):
    [(message, _)] = refuse(copied(trained_in_full, **{LINEAR: None}), "--layout", "pretrained")
    assert LINEAR in message
    shown = refuse("full.safetensors", "--layout", "pretrained", "--config", "vae=.", "--config", "dit=missing.json")
    assert [name in message for (message, _), name in zip(shown, ("vae=.", "missing.json", LINEAR), strict=True)]
    assert len(refuse("full.safetensors", "--config", "config.json")) == 1
    both = ("--layout", "pretrained", "--dtype", "fp8_scaled")
    [(message, _)] = refuse(copied(trained_in_full), *both)
    assert "ignores the scales" in message
    assert len(refuse("full.safetensors", "--by", "size", "--dtype", "float16", "--config", ".")) == 2
    narrow = load_file(trained_in_full)[LINEAR].to(torch.float8_e4m3fn)
    [(message, _)] = refuse(copied(trained_in_full, **{LINEAR: narrow}), "--dtype", "fp8_scaled")
    assert LINEAR in message


@pytest.mark.parametrize(("key", "value", "dtype"), [(NORM, 1e6, "float16"), (LINEAR, float("nan"), "fp8_scaled")])
def test_numbers_that_do_not_fit_are_named(cli, trained_in_full, key, value, dtype):
    """Found while they are converted; nothing is left of the files."""
    wrong = torch.full_like(load_file(trained_in_full)[key], value, dtype=torch.float32)
    outcome = cli("split-ckpt", copied(trained_in_full, **{key: wrong}), "--output_path", "parts", "--dtype", dtype)
    [(message, _)] = read_problems(outcome.err.partition("error: ")[1] + outcome.err.partition("error: ")[2])
    assert outcome.code == 1 and key in message and not Path("parts").exists()
