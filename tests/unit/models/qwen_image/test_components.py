"""Qwen-Image at its published sizes, on the meta device: inferred configurations, exact parameter counts."""

import pytest
import torch

from diffsynth_core.models.qwen_image.components import (
    build,
    config_of,
    infer_text_encoder,
    infer_transformer,
    infer_vae,
)
from diffsynth_core.models.qwen_image.keys import TEXT_ENCODER_FILES
from diffsynth_core.models.shapes import count_blocks, split_even
from diffsynth_core.models.spec import ComponentFiles

TRANSFORMER = {
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0, "rope_type": "default"},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
PARAMETERS = {"dit": 20430401088, "vae": 126892531, "text_encoder": 8292166656}
INFER = {"dit": infer_transformer, "vae": infer_vae, "text_encoder": infer_text_encoder}


def published(component: str) -> torch.nn.Module:
    """Build a component with its library from the published config, on the meta device."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        if component == "dit":
            return QwenImageTransformer2DModel(**TRANSFORMER)
        if component == "vae":
            return AutoencoderKLQwenImage()
        text = {**TEXT, "tie_word_embeddings": False}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=VISION))


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    return {component: published(component) for component in PARAMETERS}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("component", PARAMETERS)
def test_the_published_sizes(modules, component):
    assert sum(parameter.numel() for parameter in modules[component].parameters()) == PARAMETERS[component]


@pytest.mark.parametrize("component", PARAMETERS)
def test_what_is_inferred_builds_the_same_module(modules, component):
    shapes = shapes_of(modules[component])
    with torch.device("meta"):
        rebuilt = build(component, INFER[component](shapes))
    assert type(rebuilt) is type(modules[component])
    assert shapes_of(rebuilt) == shapes


def test_the_transformer_s_configuration_is_the_published_one(modules):
    found = infer_transformer(shapes_of(modules["dit"]))
    assert {name: found[name] for name in TRANSFORMER} == TRANSFORMER
    config = dict(modules["dit"].config)
    assert {name: config[name] for name in found} | {"axes_dims_rope": list(config["axes_dims_rope"])} == found


def test_the_vae_s_configuration_is_the_published_one(modules):
    found = infer_vae(shapes_of(modules["vae"]))
    config = dict(modules["vae"].config)
    assert {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in found} == found
    with torch.device("meta"):
        rebuilt = dict(build("vae", found).config)
    assert (rebuilt["latents_mean"], rebuilt["latents_std"]) == (config["latents_mean"], config["latents_std"])


def test_the_text_encoder_s_configuration_is_the_published_one(modules):
    found = infer_text_encoder(shapes_of(modules["text_encoder"]))
    assert {name: found["vision_config"][name] for name in VISION} == VISION
    plain = {name: value for name, value in TEXT.items() if name != "rope_scaling"}
    assert {name: found["text_config"][name] for name in plain} == plain
    assert found["text_config"]["rope_scaling"]["mrope_section"] == [16, 24, 24]
    assert found["text_config"]["rms_norm_eps"] == 1e-6  # as in its config.json; the class has another default
    assert found["tie_word_embeddings"] is False


def test_the_text_encoder_inferred_computes_as_the_published_one(modules):
    with torch.device("meta"):
        rebuilt = build("text_encoder", infer_text_encoder(shapes_of(modules["text_encoder"]))).config
    config = modules["text_encoder"].config
    for name in (
        "rope_parameters",
        "hidden_act",
        "head_dim",
        "max_window_layers",
        "use_sliding_window",
    ):
        assert getattr(rebuilt.text_config, name, None) == getattr(config.text_config, name, None), name
    for name in ("hidden_act", "temporal_patch_size", "in_channels", "tokens_per_second"):
        assert getattr(rebuilt.vision_config, name, None) == getattr(config.vision_config, name, None), name


def test_the_names_of_older_files_infer_the_same(modules):
    shapes = shapes_of(modules["text_encoder"])
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): shape
        for name, shape in shapes.items()
    }
    assert older.keys() != shapes.keys()
    assert infer_text_encoder(
        {TEXT_ENCODER_FILES.to_targets(name)[0]: shape for name, shape in older.items()}
    ) == infer_text_encoder(shapes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3},
        {"num_attention_heads": 5},
        {"joint_attention_dim": 64},
        {"in_channels": 48, "out_channels": 12},
    ],
)
def test_other_sizes_of_the_transformer_are_inferred_too(changes):
    from diffusers import QwenImageTransformer2DModel

    settings = {**TRANSFORMER, "num_layers": 2, **changes}
    with torch.device("meta"):
        module = QwenImageTransformer2DModel(**settings)
    found = infer_transformer(shapes_of(module))
    assert {name: found[name] for name in settings} == settings


@pytest.mark.parametrize(
    "settings",
    [
        {"base_dim": 32},
        {"dim_mult": [1, 2, 2], "temperal_downsample": [True, False]},
        {"num_res_blocks": 1},
        {"z_dim": 8},
    ],
)
def test_other_sizes_of_the_vae_are_inferred_too(settings):
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        module = AutoencoderKLQwenImage(**settings)
    found = infer_vae(shapes_of(module))
    assert {name: found[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("total", "proportion", "parts"),
    [
        (128, (16, 56, 56), (16, 56, 56)),
        (64, (16, 56, 56), (8, 28, 28)),
        (96, (16, 56, 56), (12, 42, 42)),
        (32, (16, 56, 56), (4, 14, 14)),
        (128, (16, 24, 24), (32, 48, 48)),
    ],
)
def test_rotary_axes_keep_their_proportion_and_are_even(total, proportion, parts):
    assert split_even(total, proportion) == parts
    assert sum(parts) == total and all(part % 2 == 0 for part in parts)


@pytest.mark.parametrize("total", [16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 256])
def test_no_rotary_axis_vanishes(total):
    assert min(split_even(total, (16, 56, 56))) >= 2


def test_blocks_are_counted_by_their_highest_number():
    assert (
        count_blocks({"blocks.0.a": (1,), "blocks.10.a": (1,), "blocks.2.b.7": (1,), "other.99": (1,)}, "blocks.") == 11
    )


@pytest.mark.parametrize("component", PARAMETERS)
def test_a_configuration_beside_the_files_goes_first(tmp_path, component):
    (tmp_path / "config.json").write_text('{"num_layers": 7}')
    files = ComponentFiles(component, "x", (), tmp_path / "config.json")
    assert config_of(files, {}) == {"num_layers": 7}


@pytest.mark.parametrize("component", ["dit", "vae"])  # a text encoder's head size shows in no shape: it is 128
def test_the_configuration_of_the_tiny_models_is_inferred_where_shapes_tell(tiny_models, component):
    from diffsynth_core.models.registry import load_family
    from diffsynth_core.weights.headers import read_headers

    folder = {"dit": "transformer"}.get(component, component)
    paths = sorted(tiny_models.glob(f"*/*/{folder}/*.safetensors"))
    shapes = {name: tensor.shape for name, tensor in read_headers(paths).items()}
    files = ComponentFiles(component, "x", tuple(paths), None)
    with torch.device("meta"):
        assert shapes_of(build(component, load_family("qwen-image").config_of(files, shapes))) == shapes
