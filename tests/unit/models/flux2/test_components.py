"""FLUX.2 klein at its published sizes, on the meta device: inferred configurations, exact parameter counts."""

import json
import math
from functools import cache

import pytest
import torch
from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.flux2.components import (
    build,
    config_of,
    infer_text_encoder,
    infer_transformer,
    infer_vae,
    load_tokenizer,
    rope_axes,
)
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.models.tiny_tokenizers import write_tokenizer

KLEIN = {"attention_head_dim": 128, "mlp_ratio": 3.0, "axes_dims_rope": [32, 32, 32, 32], "guidance_embeds": False}
SMALL = KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
LARGE = KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
QWEN3 = {
    "vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rope_theta": 1000000,
}  # fmt: skip
QWEN3_4B = QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
PUBLISHED: dict[str, tuple[str, dict[str, object], int]] = {
    "4b": ("dit", SMALL, 3875544576),
    "9b": ("dit", LARGE, 9078581248),
    "vae": ("vae", {}, 84046115),
    "qwen3 4b": ("text_encoder", QWEN3_4B, 4022468096),
    "qwen3 8b": ("text_encoder", QWEN3_8B, 7568405504),
}
"""Parameter counts of text encoders exclude the output head: the untied one of 8B has 151936 x 4096 more."""
INFER = {"dit": infer_transformer, "vae": infer_vae, "text_encoder": infer_text_encoder}
TINY_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}


@cache
def published(case: str) -> nn.Module:
    """Build a component with its library from the published config, on the meta device."""
    component, settings, _ = PUBLISHED[case]
    return without_memory(component, **settings)


def without_memory(component: str, **settings: object) -> nn.Module:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        if component == "dit":
            return Flux2Transformer2DModel(**settings)
        if component == "vae":
            return AutoencoderKLFlux2(**settings)
        return Qwen3ForCausalLM(Qwen3Config(**settings))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return shapes as in a file: without a tied output head."""
    tied = getattr(module.config, "tie_word_embeddings", False)
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def plain(config: object, keys: dict[str, object]) -> dict[str, object]:
    """Return the same keys of a library's configuration, with sequences as lists."""
    values = {name: getattr(config, name) for name in keys}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_sizes(case):
    counts = {name: math.prod(parameter.shape) for name, parameter in published(case).named_parameters()}
    head = counts.pop("lm_head.weight", 0)
    assert sum(counts.values()) == PUBLISHED[case][2]
    assert head == (151936 * 4096 if case == "qwen3 8b" else 0)


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_configuration_is_inferred_and_builds_the_same_module(case):
    component, settings, _ = PUBLISHED[case]
    module = published(case)
    found = INFER[component](shapes_of(module))
    assert {name: found[name] for name in settings} == settings
    said_otherwise = {"rope_theta", "out_channels"}  # a part of `rope_parameters`; None where it is as `in_channels`
    reported = {name: value for name, value in found.items() if name not in said_otherwise}
    assert plain(module.config, reported) == reported
    with torch.device("meta"):
        rebuilt = build(component, found)
    assert type(rebuilt) is type(module)
    assert shapes_of(rebuilt) == shapes_of(module)
    assert sum(parameter.numel() for parameter in rebuilt.parameters()) == sum(
        parameter.numel() for parameter in module.parameters()
    )


@pytest.mark.parametrize("case", ["qwen3 4b", "qwen3 8b"])
def test_the_text_encoder_inferred_computes_as_the_published_one(case):
    with torch.device("meta"):
        rebuilt = build("text_encoder", infer_text_encoder(shapes_of(published(case)))).config
    config = published(case).config
    assert rebuilt.rope_parameters == {"rope_type": "default", "rope_theta": 1000000}
    for name in ("rope_parameters", "hidden_act", "rms_norm_eps", "layer_types", "sliding_window", "attention_bias"):
        assert getattr(rebuilt, name) == getattr(config, name), name


@pytest.mark.parametrize(
    ("head_size", "axes"),
    [(128, [32, 32, 32, 32]), (64, [16, 16, 16, 16]), (16, [4, 4, 4, 4]), (20, [8, 4, 4, 4]), (12, [6, 2, 2, 2])],
)
def test_rotary_axes_keep_a_proportion_and_are_even(head_size, axes):
    assert rope_axes(head_size) == axes
    assert sum(axes) == head_size


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "num_single_layers": 3},
        {"attention_head_dim": 64, "num_attention_heads": 3, "axes_dims_rope": [16] * 4},
        {"joint_attention_dim": 96},
        {"in_channels": 16, "out_channels": 12},
        {"mlp_ratio": 2.5},
        {"timestep_guidance_channels": 64},
        {"guidance_embeds": True},
    ],
)
def test_other_sizes_of_the_transformer_are_inferred_too(changes):
    settings = SMALL | {"num_layers": 1, "num_single_layers": 1} | changes
    module = without_memory("dit", **settings)
    found = infer_transformer(shapes_of(module))
    assert {name: found[name] for name in settings} == settings
    with torch.device("meta"):
        assert shapes_of(build("dit", found)) == shapes_of(module)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        {"head_dim": 32},
        {"hidden_size": 96, "intermediate_size": 100},
        {"tie_word_embeddings": False},
    ],
)
def test_other_sizes_of_the_text_encoder_are_inferred_too(changes):
    settings = QWEN3_4B | {"vocab_size": 50} | changes
    module = without_memory("text_encoder", **settings)
    found = infer_text_encoder(shapes_of(module))
    assert {name: found[name] for name in settings} == settings
    with torch.device("meta"):
        assert shapes_of(build("text_encoder", found)) == shapes_of(module)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 3},
        {"latent_channels": 8},
        {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        {"decoder_block_out_channels": [4, 8, 8, 8]},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"patch_size": [1, 1]},
    ],
)  # fmt: skip
def test_other_sizes_of_the_vae_are_inferred_too(changes):
    settings = TINY_VAE | changes
    module = without_memory("vae", **settings)
    found = infer_vae(shapes_of(module))
    reported = {name: value for name, value in settings.items() if name != "norm_num_groups"}
    assert {name: found[name] for name in reported} == reported
    with torch.device("meta"):
        assert shapes_of(build("vae", found)) == shapes_of(module)


@pytest.mark.parametrize(
    ("widths", "groups"), [([128, 256, 512, 512], 32), ([32, 32, 64, 64], 32), ([16, 32, 32, 32], 16), ([24] * 4, 8)]
)
def test_the_groups_of_the_vae_s_norms_are_a_rule(widths, groups):
    module = without_memory("vae", **TINY_VAE | {"block_out_channels": widths})
    assert infer_vae(shapes_of(module))["norm_num_groups"] == groups


def files_with(folder, component: str, config: dict[str, object]) -> ComponentFiles:
    (folder / "config.json").write_text(json.dumps(config))
    return ComponentFiles(component, "x", (), folder / "config.json")


@pytest.mark.parametrize("component", ["dit", "vae"])
def test_a_configuration_beside_the_files_goes_first(tmp_path, component):
    config = {"_class_name": "x", "num_layers": 7}
    assert config_of(files_with(tmp_path, component, config), {}) == config


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_a_vocabulary_head_that_is_not_there_is_the_embedding(tmp_path, reported, head):
    config = QWEN3_8B | {"tie_word_embeddings": reported}
    shapes = {"lm_head.weight": (1, 1)} if head else {}
    found = config_of(files_with(tmp_path, "text_encoder", config), shapes)
    assert found == config | {"tie_word_embeddings": reported or not head}


TINY = {
    "dit": {
        "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 12, "in_channels": 8, "axes_dims_rope": [4] * 4, "guidance_embeds": False,
    },
    "text_encoder": {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "vae": TINY_VAE,
}  # fmt: skip


def output_of(component: str, module: nn.Module) -> torch.Tensor:
    if component == "vae":
        return module.encode(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).latent_dist.mode()
    if component == "text_encoder":
        tokens = torch.arange(12).view(1, 12)
        return torch.cat(module.model(tokens, output_hidden_states=True, use_cache=False).hidden_states)
    positions = torch.zeros(5, 4, dtype=torch.int64)
    return module(
        hidden_states=torch.linspace(-1, 1, 5 * 8).view(1, 5, 8),
        encoder_hidden_states=torch.linspace(1, -1, 3 * 12).view(1, 3, 12),
        timestep=torch.tensor([0.5]),
        img_ids=positions,
        txt_ids=positions[:3],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("component", TINY)
def test_recomputing_activations_changes_no_gradient(component):
    torch.manual_seed(0)
    module = build(component, TINY[component]).eval()
    saved: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        if recompute:
            load_family("flux2").checkpoint_gradients(component, module)
        module.zero_grad()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            loss = output_of(component, module).pow(2).sum()
        saved.append([torch.tensor(float(len(kept)))])
        loss.backward()
        saved[-1] += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    (count, *plain_gradients), (fewer, *gradients) = saved
    assert fewer < count
    assert len(gradients) == len(plain_gradients) > 5
    assert all(torch.equal(left, right) for left, right in zip(plain_gradients, gradients, strict=True))


def test_a_damaged_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DiffSynthError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_told(tmp_path):
    write_tokenizer(tmp_path, ("user",), ("<|endoftext|>", "<|im_end|>"))
    with pytest.raises(DiffSynthError, match="has no chat template"):
        load_tokenizer(tmp_path)
