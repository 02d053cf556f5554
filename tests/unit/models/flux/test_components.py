"""FLUX.1 at its published sizes, on the meta device.

Inferred configurations, exact parameter counts, all layouts; variants of the transformer, and sizes of reference
images.
"""

import json
from functools import cache

import pytest
import torch
from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.flux import keys
from diffsynth_core.models.flux.components import (
    build,
    config_of,
    infer_clip,
    infer_transformer,
    infer_vae,
    load_tokenizer,
)
from diffsynth_core.models.flux.spec import FLUX, KONTEXT_SIZES, kontext_size
from diffsynth_core.models.flux.tiny import write_tiny_weights
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.shapes import infer_t5_encoder
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.weights.key_maps import KeyMap

TRANSFORMER = {
    "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}  # fmt: skip
CLIP = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768,
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, object], int]] = {
    "dit": (TRANSFORMER, 11901408320),
    "vae": (VAE, 83819683),
    "text_encoder_1": (CLIP, 123060480),
    "text_encoder_2": (T5, 4762310656),
}
INFER = {
    "dit": infer_transformer,
    "vae": infer_vae,
    "text_encoder_1": infer_clip,
    "text_encoder_2": infer_t5_encoder,
}
OTHER_LAYOUTS: dict[str, tuple[str, KeyMap]] = {
    "original transformer": ("dit", keys.DIT_ORIGINAL),
    "documented transformer": ("dit", keys.DIT),
    "original vae": ("vae", keys.VAE_ORIGINAL),
    "clip": ("text_encoder_1", keys.CLIP),
}


@cache
def published(component: str) -> nn.Module:
    """Build a component with its library from the published config, on the meta device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    settings, _ = PUBLISHED[component]
    with torch.device("meta"):
        match component:
            case "dit":
                return FluxTransformer2DModel(**settings)
            case "vae":
                return AutoencoderKL(**settings)
            case "text_encoder_1":
                return CLIPTextModel(CLIPTextConfig(**settings))
            case _:
                return T5EncoderModel(T5Config(**settings))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return shapes as in a file: the tied embedding of T5 once."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }


def plain(config: object, keys: dict[str, object]) -> dict[str, object]:
    """Return the same keys of a library's configuration, with sequences as lists."""
    values = {name: getattr(config, name) for name in keys}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@pytest.mark.parametrize("component", PUBLISHED)
def test_the_published_sizes(component):
    assert sum(parameter.numel() for parameter in published(component).parameters()) == PUBLISHED[component][1]


@pytest.mark.parametrize("component", PUBLISHED)
def test_the_published_configuration_is_inferred_and_builds_the_same_module(component):
    settings, _ = PUBLISHED[component]
    module = published(component)
    found = INFER[component](shapes_of(module))
    assert {name: found[name] for name in settings} == settings
    assert plain(module.config, found) == found
    with torch.device("meta"):
        rebuilt = build(component, found)
    assert type(rebuilt) is type(module)
    assert shapes_of(rebuilt) == shapes_of(module)


@pytest.mark.parametrize("case", OTHER_LAYOUTS)
def test_files_of_other_layouts_hold_as_many_numbers_and_infer_the_same(case):
    component, table = OTHER_LAYOUTS[case]
    shapes = shapes_of(published(component))
    theirs = {name: table.fuse_shape(name, shapes) for name in table.to_sources(shapes)}
    assert theirs.keys() != shapes.keys()
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == PUBLISHED[component][1]
    ours: dict[str, tuple[int, ...]] = {}
    for name, shape in theirs.items():
        ours |= table.split_shape(name, shape)
    assert ours == shapes
    assert INFER[component](ours) == INFER[component](shapes)


def test_the_original_files_have_the_published_shapes():
    shapes = shapes_of(published("dit"))
    table = keys.DIT_ORIGINAL
    assert table.fuse_shape("double_blocks.18.img_attn.qkv.weight", shapes) == (9216, 3072)
    assert table.fuse_shape("single_blocks.37.linear1.weight", shapes) == (21504, 3072)
    assert table.fuse_shape("single_blocks.37.linear2.weight", shapes) == (3072, 15360)
    assert table.fuse_shape("final_layer.adaLN_modulation.1.weight", shapes) == (6144, 3072)
    attention = shapes_of(published("vae"))
    assert keys.VAE_ORIGINAL.fuse_shape("encoder.mid.attn_1.q.weight", attention) == (512, 512, 1, 1)
    assert keys.VAE_ORIGINAL.fuse_shape("encoder.mid.attn_1.q.bias", attention) == (512,)


@pytest.mark.parametrize("component", INFER)
def test_a_configuration_of_the_libraries_goes_first(tmp_path, component):
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_of(ComponentFiles(component, "x", (), tmp_path / "config.json"), {}) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]},
        {"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": [8, 28, 28]},
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "guidance_embeds": False, "pooled_projection_dim": 5},
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "in_channels": 384, "out_channels": 64},
    ],
)  # fmt: skip
def test_other_sizes_of_the_transformer_are_inferred_too(settings):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        module = FluxTransformer2DModel(**settings)
        found = infer_transformer(shapes_of(module))
        assert {name: found[name] for name in settings} == settings
        assert shapes_of(build("dit", found)) == shapes_of(module)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"block_out_channels": [8, 16, 16, 16]}, 8),
        ({"block_out_channels": [32, 64, 96, 128], "layers_per_block": 1}, 32),
        ({"block_out_channels": [64, 64, 64], "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}, 32),
    ],
)  # fmt: skip
def test_other_sizes_of_the_vae_are_inferred_too(changes, groups):
    from diffusers import AutoencoderKL

    levels = len(changes["block_out_channels"])
    kinds = {f"{side}_block_types": VAE[f"{side}_block_types"][:levels] for side in ("down", "up")}
    with torch.device("meta"):
        module = AutoencoderKL(**VAE | kinds | changes, norm_num_groups=groups)
        found = infer_vae(shapes_of(module))
        assert {name: found[name] for name in changes} == changes
        assert found["norm_num_groups"] == groups
        assert shapes_of(build("vae", found)) == shapes_of(module)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1280, 20), (96, 3), (32, 1)])
def test_the_size_of_a_head_of_clip_is_a_rule(width, heads):
    with torch.device("meta"):
        module = build("text_encoder_1", CLIP | {"hidden_size": width, "num_attention_heads": 1})
    found = infer_clip(shapes_of(module))
    assert (found["hidden_size"], found["num_attention_heads"]) == (width, heads)
    assert found["eos_token_id"] == 49407


# Kinds


def published_shapes(**changes: object) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(build("dit", TRANSFORMER | {"num_layers": 1, "num_single_layers": 1} | changes))


@pytest.mark.parametrize(
    ("origin", "title", "model_id"),
    [
        ("black-forest-labs/FLUX.1-dev:flux1-dev.safetensors", "FLUX.1", "black-forest-labs/FLUX.1-dev"),
        ("black-forest-labs/FLUX.1-Krea-dev:flux1-krea-dev.safetensors", "FLUX.1 Krea", "black-forest-labs/FLUX.1-Krea-dev"),
        ("models/flux1-kontext-dev.safetensors", "FLUX.1 Kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
        ("", "FLUX.1", "black-forest-labs/FLUX.1-dev"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inputs", [(), ("kontext_images",)])
def test_all_transformers_with_guidance_can_be_shown_images(origin, title, model_id, inputs):
    for shapes in ({}, published_shapes()):
        variant = FLUX.variant({"dit": shapes}, inputs, origin)
        assert (variant.title, variant.model_id) == (title, model_id)
        assert variant.components == ("dit", "text_encoder_1", "text_encoder_2", "vae")
        assert (variant.accepted_inputs, variant.required_inputs) == (("kontext_images", "controlnet_image"), ())
        assert tuple(reference.column for reference in variant.conditions) == inputs
        made = [encoder.name for encoder in variant.encoders]
        assert made == ["text_1", "text_2", "latents", *(["kontext_latents"] if inputs else [])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_embeds": False}, "no guidance embedder"),
        ({"in_channels": 384, "out_channels": 64}, "has 384 input and 64 output channels"),
        ({"in_channels": 128, "out_channels": 64}, "has 128 input and 64 output channels"),
    ],
)
def test_kinds_that_are_not_trained_are_told(changes, message):
    with pytest.raises(DiffSynthError, match=message):
        FLUX.variant({"dit": published_shapes(**changes)}, (), "")


# Reference images


@pytest.mark.parametrize("width", [1, 300, 667, 1000, 1024, 1500, 4096])
@pytest.mark.parametrize("height", [37, 512, 1024, 1025, 3000])
def test_reference_images_have_the_pipeline_s_size(width, height):
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert list(KONTEXT_SIZES) == PREFERRED_KONTEXT_RESOLUTIONS
    ratio = width / height
    _, expected_width, expected_height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    expected = (expected_height // 16 * 16, expected_width // 16 * 16)
    for max_pixels in (1024 * 1024, 2048 * 2048):
        assert kontext_size(width, height, max_pixels) == expected


def test_smaller_images_have_smaller_references():
    assert kontext_size(1024, 1024, 512 * 512) == (512, 512)
    assert kontext_size(2000, 1000, 512 * 512) == (352, 720)
    assert kontext_size(640, 480, 128 * 160) == (112, 160)
    assert 0 in kontext_size(640, 480, 15 * 15)


# Modules as they are trained


TINY_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TINY_CLIP = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 48, "eos_token_id": 49,
}  # fmt: skip
TINY_TRANSFORMER = {
    "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64,
    "joint_attention_dim": 12, "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
TINY_VAE = VAE | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 8}
TRANSFORMER_INPUTS = {
    "hidden_states": torch.linspace(-1, 1, 6 * 64).view(1, 6, 64),
    "encoder_hidden_states": torch.linspace(-1, 1, 5 * 12).view(1, 5, 12),
    "pooled_projections": torch.linspace(-1, 1, 8).view(1, 8),
    "timestep": torch.tensor([0.5]),
    "guidance": torch.ones(1),
    "img_ids": torch.zeros(6, 3),
    "txt_ids": torch.zeros(5, 3),
}


def test_the_text_encoder_reads_the_embedding_its_files_have():
    """Files have `tie_word_embeddings: false`, about a decoder's head, and contain only `shared.weight`."""
    config = {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "architectures": ["T5EncoderModel"]}
    module = build("text_encoder_2", TINY_T5 | config | {"model_type": "t5"})
    assert module.encoder.embed_tokens.weight is module.shared.weight
    assert module.dtype == torch.float32


@pytest.mark.parametrize(
    ("component", "config"),
    [("text_encoder_1", TINY_CLIP | {"attention_dropout": 0.5}), ("text_encoder_2", TINY_T5 | {"dropout_rate": 0.1})],
)
def test_training_a_text_encoder_switches_no_dropout_on(component, config):
    module = build(component, config)
    load_family("flux").checkpoint_gradients(component, module)
    assert module.training
    tokens = torch.arange(38, 50).view(1, 12)
    outputs = [module(tokens).last_hidden_state for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], module.eval()(tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("component", "config", "inputs"),
    [
        ("text_encoder_1", TINY_CLIP, {"input_ids": torch.arange(38, 50).view(1, 12)}),
        ("text_encoder_2", TINY_T5, {"input_ids": torch.arange(38, 50).view(1, 12)}),
        ("vae", TINY_VAE, {"sample": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}),
        ("dit", TINY_TRANSFORMER, TRANSFORMER_INPUTS),
    ],
)
def test_recomputing_activations_changes_no_gradient(component, config, inputs):
    torch.manual_seed(0)
    module = build(component, config).eval()
    saved: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        if recompute:
            load_family("flux").checkpoint_gradients(component, module)
        module.zero_grad()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            loss = module(**inputs)[0].pow(2).sum()
        saved.append([torch.tensor(float(len(kept)))])
        loss.backward()
        saved[-1] += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    (count, *plain_gradients), (fewer, *gradients) = saved
    assert fewer < count
    assert all(torch.equal(left, right) for left, right in zip(plain_gradients, gradients, strict=True))


# Tokenizers


@pytest.mark.parametrize("files", [{}, {"spiece.model": b"x"}, {"tokenizer.json": b"{"}])
def test_a_folder_without_a_tokenizer_is_told(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DiffSynthError, match="cannot read the tokenizer in") as told:
        load_tokenizer("tokenizer_2_path", tmp_path)
    assert "--tokenizer_2_path" in told.value.problems[0].hint


def test_t5_s_tokenizer_is_read_as_its_file_says(tmp_path):
    """transformers 5 drops its normalization, which maps `ﬁne` to `fine`."""
    from tokenizers import Tokenizer, normalizers

    write_tiny_weights(tmp_path, "text_encoder_2", "x", "text_encoder_2/model.safetensors")
    folder = tmp_path / "x" / "tokenizer_2"
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    published.normalizer = normalizers.NFKC()
    published.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer("tokenizer_2_path", folder)
    assert tokenizer("ﬁne")["input_ids"] == tokenizer("fine")["input_ids"] == published.encode("ﬁne").ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
