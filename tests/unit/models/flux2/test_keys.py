"""FLUX.2's keys: recognition, LoRA targets, and unused parameters; against tiny modules."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.flux2 import keys
from diffsynth_core.models.flux2.components import build
from diffsynth_core.models.flux2.spec import FLUX2, reference_size, variant
from diffsynth_core.models.recognition import component_at, family_of_model, recognize, recognize_family
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import is_below, match_targets, modules_with_weights
from diffsynth_core.weights.lora_formats import LORA_FORMATS

DIT = {
    "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8,
    "joint_attention_dim": 12, "in_channels": 8, "axes_dims_rope": [2] * 4, "guidance_embeds": False,
}  # fmt: skip
TEXT = {
    "vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 30, "head_dim": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip
MODULES = {
    "dit": DIT,
    "text_encoder": TEXT,
    "vae": {"block_out_channels": [4] * 4, "layers_per_block": 1, "norm_num_groups": 2},
}
DOUBLE_MODULES = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{part}.{name}" for part in ("ff", "ff_context") for name in ("linear_in", "linear_out")),
)
SINGLE_MODULES = ("attn.to_qkv_mlp_proj", "attn.to_out")


@cache
def module_of(component: str) -> nn.Module:
    torch.manual_seed(0)
    return build(component, MODULES[component]).eval()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("component", MODULES)
def test_components_are_recognized_and_no_other_family_takes_them(component):
    tensors = shapes_of(module_of(component))
    for facts in FAMILIES.values():
        found = recognize(tensors, facts)
        assert (found[0].name if found else None) == (component if facts is FLUX2 else None)
    assert recognize_family(tensors) is (FLUX2 if component == "dit" else None)


@pytest.mark.parametrize(
    ("model_id", "ours"),
    [
        ("black-forest-labs/FLUX.2-klein-4B", True),
        ("black-forest-labs/FLUX.2-klein-base-9B", True),
        ("black-forest-labs/FLUX.2-dev", True),
        ("black-forest-labs/FLUX.1-dev", False),
    ],
)
def test_the_family_is_known_by_its_repositories(model_id, ours):
    assert (family_of_model(model_id) is FLUX2) == ours


@pytest.mark.parametrize(
    ("place", "component"),
    [
        ("transformer/*.safetensors", "dit"),
        ("text_encoder/*.safetensors", "text_encoder"),
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("tokenizer/", None),
    ],
)
def test_components_are_known_by_their_place(place, component):
    found = component_at(place, FLUX2)
    assert (found.name if found else None) == component


def test_encodings_depend_on_the_chat_template():
    files = FLUX2.tokenizers["tokenizer_path"].files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(files)


# LoRA


def test_the_documented_lora_targets():
    modules = modules_with_weights(shapes_of(module_of("dit")))
    found = match_targets(modules, keys.LORA_TARGETS)
    blocks, single_blocks = 2, 3
    assert {target: len(addressed) for target, addressed in found.items()} == {
        **dict.fromkeys(keys.LORA_TARGETS[:8], blocks),
        **dict.fromkeys(("linear_in", "linear_out"), 2 * blocks),
        **dict.fromkeys(("to_qkv_mlp_proj", "to_out"), single_blocks),
    }
    assert {module for addressed in found.values() for module in addressed} == {
        *(f"transformer_blocks.{block}.{name}" for block in range(blocks) for name in DOUBLE_MODULES),
        *(f"single_transformer_blocks.{block}.{name}" for block in range(single_blocks) for name in SINGLE_MODULES),
    }


def test_the_ending_to_out_addresses_what_recipes_list_block_by_block():
    """In double blocks `to_out` is a list without a weight of its own."""
    modules = modules_with_weights(shapes_of(module_of("dit")))
    listed = tuple(f"single_transformer_blocks.{block}.attn.to_out" for block in range(3))
    one_by_one = match_targets(modules, listed)
    assert all(addressed == [target] for target, addressed in one_by_one.items())
    assert match_targets(modules, ("to_out",))["to_out"] == sorted(listed)
    assert isinstance(module_of("dit").transformer_blocks[0].attn.to_out, nn.ModuleList)


def test_only_dialects_with_these_names_are_written():
    naming = FLUX2.component("dit").lora_naming
    assert [lora_format for lora_format in LORA_FORMATS if naming.written(lora_format)] == ["diffsynth", "diffusers"]


# What nothing reads


def silent_parameters(component: str, output: Callable[[nn.Module], torch.Tensor]) -> set[str]:
    """Return parameters that receive no gradient from an output."""
    module = module_of(component)
    module.zero_grad()
    output(module).pow(2).sum().backward()
    return {name for name, parameter in module.named_parameters() if parameter.grad is None}


def test_untrainable_of_the_text_encoder_is_what_the_transformer_does_not_read():
    def states(module: nn.Module) -> torch.Tensor:
        layers = module.model(torch.arange(6)[None], output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([layers[layer] for layer in keys.TEXT_LAYERS])

    silent = silent_parameters("text_encoder", states)
    module = module_of("text_encoder")
    for known in (module.named_modules(), module.named_parameters()):
        unused = keys.unused_in_text_encoder(frozenset(name for name, _ in known))
        assert unused >= {"model.norm", "lm_head", "model.layers.27", "model.layers.28", "model.layers.29"}
        assert silent and silent == {name for name, _ in module.named_parameters() if is_below(name, unused)}


def test_untrainable_of_the_vae_is_what_encoding_does_not_use():
    silent = silent_parameters("vae", lambda module: module.encode(torch.rand(1, 3, 16, 16)).latent_dist.mode())
    module = module_of("vae")
    unused = keys.unused_in_vae(frozenset(name for name, _ in module.named_modules()))
    assert silent and silent == {name for name, _ in module.named_parameters() if is_below(name, unused)}
    assert "bn" in unused


def test_every_parameter_of_the_transformer_gets_a_gradient():
    def prediction(module: nn.Module) -> torch.Tensor:
        positions = torch.arange(5)[:, None].expand(5, 4)
        return module(
            hidden_states=torch.rand(1, 5, 8),
            encoder_hidden_states=torch.rand(1, 5, 12),
            timestep=torch.tensor([0.5]),
            img_ids=positions,
            txt_ids=positions,
            return_dict=False,
        )[0]

    assert silent_parameters("dit", prediction) == set()
    assert FLUX2.component("dit").unused_params(frozenset(shapes_of(module_of("dit")))) == frozenset()


# Kinds


def test_klein_9b_is_told_by_its_single_blocks():
    for blocks, model_id in ((20, "black-forest-labs/FLUX.2-klein-4B"), (24, "black-forest-labs/FLUX.2-klein-9B")):
        shapes = {f"single_transformer_blocks.{block}.attn.to_out.weight": (1, 1) for block in range(blocks)}
        assert variant({"dit": shapes}, (), "").model_id == model_id


def test_reference_images_are_there_when_asked_for():
    without, shown = variant({}, (), ""), variant({}, ("edit_image",), "")
    assert without.conditions == () and [encoder.name for encoder in without.encoders] == ["text", "latents"]
    assert [reference.column for reference in shown.conditions] == ["edit_image"]
    assert [encoder.name for encoder in shown.encoders] == ["text", "latents", "edit_image"]
    assert without.accepted_inputs == shown.accepted_inputs == ("edit_image",)


@pytest.mark.parametrize(
    "shapes",
    [
        {"time_guidance_embed.guidance_embedder.linear_1.weight": (32, 256)},
        {"context_embedder.weight": (6144, 15360)},
    ],
)
def test_flux2_dev_is_refused(shapes):
    with pytest.raises(DiffSynthError, match=r"`here` is the FLUX\.2-dev transformer, which is not supported yet"):
        variant({"dit": shapes}, (), "here")


def test_mistral_s_files_are_known_in_both_spellings(tmp_path: Path):
    """transformers saves with the keys of the published files, which differ from its module keys."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": 8, "num_key_value_heads": 1, **sizes},
        vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 16, **sizes},
    )
    module = Mistral3ForConditionalGeneration(config)
    module.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = frozenset(file.keys())
    spellings = (written, frozenset(module.state_dict()))
    told = [[known.title for known in FLUX2.lookalikes if known.signature <= spelling] for spelling in spellings]
    assert told == [["the Mistral text encoder of FLUX.2-dev"], ["a Mistral text encoder such as that of FLUX.2-dev"]]
    assert all(recognize(spelling, FLUX2) is None for spelling in spellings)


def test_black_forest_labs_own_file_is_told_from_that_of_flux_1():
    """FLUX.1's has the same blocks, but separate modulations."""
    tensors = {
        *("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "double_stream_modulation_img.lin.weight"),
        *(f"double_blocks.0.{stream}_attn.{part}.weight" for stream in ("img", "txt") for part in ("qkv", "proj")),
        *(f"double_blocks.0.{stream}_mlp.{part}.weight" for stream in ("img", "txt") for part in (0, 2)),
        *(f"single_blocks.0.{part}.weight" for part in ("linear1", "linear2")),
        *("final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"),
    }
    assert recognize_family(tensors) is FLUX2
    component, layout = recognize(tensors, FLUX2)
    assert component.name == "dit" and all(layout.names.to_targets(name) for name in tensors)


# Sizes of reference images


def sizes_of_the_pipeline(width: int, height: int) -> tuple[int, int]:
    """Return the (height, width) to which diffusers scales a reference image."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = Flux2ImageProcessor._resize_if_exceeds_area(Image.new("L", (width, height)), 1024 * 1024)
    return image.height, image.width


@pytest.mark.parametrize(
    "size", [(512, 512), (1024, 1024), (1025, 1024), (1448, 1448), (4000, 3000), (451, 300), (600, 400), (3000, 400), (100, 70), (1030, 1063), (1030, 1162)]
)  # fmt: skip
@pytest.mark.parametrize("max_pixels", [1024 * 1024, 4 * 1024 * 1024])
def test_reference_images_have_the_pipeline_s_size(size, max_pixels):
    assert reference_size(*size, max_pixels) == sizes_of_the_pipeline(*size)


def test_fewer_pixels_make_reference_images_smaller():
    height, width = reference_size(4000, 3000, 256 * 256)
    assert (height, width) == (221, 295)
    assert reference_size(200, 100, 256 * 256) == (100, 200)
    assert math.prod(reference_size(1024, 1024, 1024 * 1024)) == 1024 * 1024


@pytest.mark.parametrize("size", [(64, 64), (63, 64), (640, 64), (512, 64), (513, 64), (2400, 300), (300, 2401)])
def test_images_that_the_pipeline_refuses_are_too_small_or_too_narrow(size):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    try:
        Flux2ImageProcessor.check_image_input(Image.new("RGB", size))
    except ValueError:
        assert reference_size(*size, 1024 * 1024) == (0, 0)
    else:
        assert min(reference_size(*size, 1024 * 1024)) > 0
