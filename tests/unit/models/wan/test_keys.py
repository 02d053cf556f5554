"""Wan's keys: each key map against tiny modules in both directions, and against diffusers' own converters."""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.recognition import recognize
from diffsynth_core.models.spec import is_below, match_targets, modules_with_weights
from diffsynth_core.models.wan import keys
from diffsynth_core.models.wan.components import build
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap, TableMap

TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 24}
IMAGE = {"in_channels": 36, "image_dim": 12, "added_kv_proj_dim": 32}
VAE_2_2 = {
    "base_dim": 4, "decoder_base_dim": 6, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
TEXT = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 28,
}  # fmt: skip
MODULES: dict[str, tuple[str, dict[str, object]]] = {
    "t2v": ("dit", TRANSFORMER),
    "i2v 2.1": ("dit", TRANSFORMER | IMAGE),
    "flf2v": ("dit", TRANSFORMER | IMAGE | {"pos_embed_seq_len": 10}),
    "i2v 2.2": ("dit", TRANSFORMER | {"in_channels": 36}),
    "ti2v": ("dit", TRANSFORMER | {"in_channels": 48, "out_channels": 48}),
    "vae 2.1": ("vae", {"base_dim": 4}),
    "vae 2.2": ("vae", VAE_2_2),
    "umt5": ("text_encoder", TEXT),
    "clip": ("image_encoder", CLIP),
}
TABLES = {
    "t2v": keys.DIT,
    "i2v 2.1": keys.DIT,
    "flf2v": keys.DIT,
    "i2v 2.2": keys.DIT,
    "ti2v": keys.DIT,
    "vae 2.1": keys.VAE_2_1,
    "vae 2.2": keys.VAE_2_2,
    "umt5": keys.TEXT_ENCODER,
    "clip": keys.IMAGE_ENCODER,
}


@cache
def module_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    module = build(*MODULES[case])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@cache
def tensors_of(case: str) -> dict[str, Tensor]:
    """Return the tensors of a module as in a file: a tied tensor once."""
    return {
        name: tensor for name, tensor in module_of(case).state_dict().items() if name != "encoder.embed_tokens.weight"
    }


def in_names_of(table: KeyMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {table.to_source(name) for name in tensors}
    assert None not in found
    return {name: table.fuse(name, tensors) for name in sorted(filter(None, found))}


def original(case: str) -> dict[str, Tensor]:
    return in_names_of(TABLES[case], tensors_of(case))


@pytest.mark.parametrize("case", TABLES)
def test_tensors_go_there_and_back_bit_for_bit(case):
    table, tensors = TABLES[case], tensors_of(case)
    theirs = original(case)
    back: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        cut = table.split(name, tensor)
        assert {key: tuple(part.shape) for key, part in cut.items()} == table.split_shape(name, tuple(tensor.shape))
        assert not back.keys() & cut.keys()
        back |= cut
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].shape == tensors[name].shape for name in tensors)
    again = {name: table.fuse(name, back) for name in theirs}
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["DIT", "TEXT_ENCODER", "VAE_2_1", "VAE_2_2", "IMAGE_ENCODER"])
def test_every_row_of_a_table_names_a_part_of_a_real_module(name):
    table = getattr(keys, name)
    used = {table.rule(name) for case, own in TABLES.items() if own is table for name in original(case)}
    assert used == table.rules.keys()


@pytest.mark.parametrize("case", [case for case, (component, _) in MODULES.items() if component == "dit"])
def test_diffusers_converts_the_transformer_alike(case):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(original(case))
    # It forgets the positions of the first and the last image.
    renamed = {
        name.replace("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"): tensor
        for name, tensor in converted.items()
    }
    assert (renamed.keys() == converted.keys()) == (case != "flf2v")
    check_equal(renamed, tensors_of(case))


def test_diffusers_converts_vae_2_1_alike():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    check_equal(convert_wan_vae_to_diffusers(original("vae 2.1")), tensors_of("vae 2.1"))


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("table", "theirs", "ours"),
    [
        (keys.DIT, "blocks.39.norm3.bias", "blocks.39.norm2.bias"),
        (keys.DIT, "blocks.7.modulation", "blocks.7.scale_shift_table"),
        (keys.DIT, "head.modulation", "scale_shift_table"),
        (keys.DIT, "blocks.0.self_attn.o", "blocks.0.attn1.to_out.0"),
        (keys.DIT, "blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"),
        (keys.DIT, "img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        (keys.TEXT_ENCODER, "token_embedding.weight", "shared.weight"),
        (keys.TEXT_ENCODER, "blocks.23.ffn.gate.0.weight", "encoder.block.23.layer.1.DenseReluDense.wi_0.weight"),
        (keys.TEXT_ENCODER, "blocks.23.ffn.fc1.weight", "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"),
        (keys.TEXT_ENCODER, "blocks.23.ffn.fc2.weight", "encoder.block.23.layer.1.DenseReluDense.wo.weight"),
        (keys.TEXT_ENCODER, "blocks.2.norm2.weight", "encoder.block.2.layer.1.layer_norm.weight"),
        (keys.TEXT_ENCODER, "norm.weight", "encoder.final_layer_norm.weight"),
        (keys.VAE_2_2, "encoder.downsamples.1.downsamples.0.residual.3.gamma", "encoder.down_blocks.1.resnets.0.norm2.gamma"),
        (keys.VAE_2_2, "encoder.downsamples.0.downsamples.2.resample.1.bias", "encoder.down_blocks.0.downsampler.resample.1.bias"),
        (keys.VAE_2_2, "decoder.upsamples.1.upsamples.3.time_conv.weight", "decoder.up_blocks.1.upsampler.time_conv.weight"),
        (keys.VAE_2_2, "decoder.upsamples.3.upsamples.2.residual.6.weight", "decoder.up_blocks.3.resnets.2.conv2.weight"),
        (keys.VAE_2_2, "conv1.weight", "quant_conv.weight"),
        (keys.IMAGE_ENCODER, "visual.transformer.31.mlp.2.bias", "encoder.layers.31.mlp.fc2.bias"),
        (keys.IMAGE_ENCODER, "visual.cls_embedding", "embeddings.class_embedding"),
        (keys.IMAGE_ENCODER, "visual.pre_norm.weight", "pre_layrnorm.weight"),
    ],
)  # fmt: skip
def test_names_of_the_published_files(table: TableMap, theirs, ours):
    assert table.to_targets(theirs) == (ours,)
    assert table.to_source(ours) == theirs


def test_clip_s_fused_projection_holds_query_key_and_value_in_this_order():
    tensors = tensors_of("clip")
    fused = original("clip")["visual.transformer.1.attn.to_qkv.weight"]
    attention = "encoder.layers.1.self_attn"
    assert fused.shape == (48, 16)
    for start, part in ((0, "q"), (16, "k"), (32, "v")):
        assert torch.equal(fused[start : start + 16], tensors[f"{attention}.{part}_proj.weight"])


def test_clip_s_embeddings_have_their_original_dimensions():
    theirs = original("clip")
    assert theirs["visual.cls_embedding"].shape == (1, 1, 16)
    assert theirs["visual.pos_embedding"].shape == (1, 5, 16)


def test_what_nobody_reads_of_clip_is_left_and_what_is_unknown_is_told():
    for name in ("visual.head", "textual.token_embedding.weight", "textual.blocks.3.norm1.bias", "log_scale"):
        assert keys.IMAGE_ENCODER.to_targets(name) == ()
    assert keys.IMAGE_ENCODER.to_targets("visual.transformer.0.attn.to_q.weight") is None
    assert keys.DIT.to_targets("vace_blocks.0.self_attn.q.weight") is None
    assert keys.TEXT_ENCODER.to_source("encoder.embed_tokens.weight") is None


def test_clip_s_files_of_diffusers_repositories_stand_one_level_deeper():
    tensors = tensors_of("clip")
    theirs = in_names_of(keys.IMAGE_ENCODER_DIFFUSERS, tensors)
    assert "vision_model.post_layernorm.weight" in theirs
    assert all(name.startswith("vision_model.") for name in theirs)
    assert {own for name in theirs for own in keys.IMAGE_ENCODER_DIFFUSERS.to_targets(name)} == tensors.keys()


SIGNATURES = {
    ("t2v", "original"): keys.DIT_ORIGINAL_SIGNATURE,
    ("t2v", "diffusers"): keys.DIT_DIFFUSERS_SIGNATURE,
    ("umt5", "original"): keys.TEXT_ENCODER_ORIGINAL_SIGNATURE,
    ("umt5", "diffusers"): keys.TEXT_ENCODER_DIFFUSERS_SIGNATURE,
    ("vae 2.1", "original"): keys.VAE_2_1_ORIGINAL_SIGNATURE,
    ("vae 2.1", "diffusers"): keys.VAE_2_1_DIFFUSERS_SIGNATURE,
    ("vae 2.2", "original"): keys.VAE_2_2_ORIGINAL_SIGNATURE,
    ("vae 2.2", "diffusers"): keys.VAE_2_2_DIFFUSERS_SIGNATURE,
    ("clip", "original"): keys.IMAGE_ENCODER_ORIGINAL_SIGNATURE,
    ("clip", "diffusers"): keys.IMAGE_ENCODER_DIFFUSERS_SIGNATURE,
    ("clip", "flat"): keys.IMAGE_ENCODER_FLAT_SIGNATURE,
}


def names_in(case: str, layout: str) -> frozenset[str]:
    if layout == "original":
        return frozenset(original(case))
    table = keys.IMAGE_ENCODER_DIFFUSERS if (case, layout) == ("clip", "diffusers") else SAME_NAMES
    return frozenset(in_names_of(table, tensors_of(case)))


@pytest.mark.parametrize("key", SIGNATURES, ids=" ".join)
def test_a_signature_tells_its_component_and_layout_from_all_others(key):
    own = {"t2v", "i2v 2.1", "flf2v", "i2v 2.2", "ti2v"} if key[0] == "t2v" else {key[0]}
    layouts = {"original", "diffusers"} | ({"flat"} if key[0] == "clip" else set())
    for case in MODULES:
        for layout in layouts:
            assert (SIGNATURES[key] <= names_in(case, layout)) == (case in own and layout == key[1]), (case, layout)


@pytest.mark.parametrize("key", SIGNATURES, ids=" ".join)
@pytest.mark.parametrize("foreign", ["t5", "clip text", "flux", "flux vae", "qwen transformer"])
def test_no_signature_fits_a_component_of_another_family(key, foreign):
    with torch.device("meta"):
        module = FOREIGN[foreign]()
    assert not SIGNATURES[key] <= module.state_dict().keys()


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**TEXT, feed_forward_proj="gated-gelu"))


def _clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=2))


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)


def _flux_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL()


def _qwen_transformer() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=1, num_attention_heads=2)


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "t5": _t5,
    "clip text": _clip_text,
    "flux": _flux,
    "flux vae": _flux_vae,
    "qwen transformer": _qwen_transformer,
}


def test_qwen_image_s_vae_has_the_names_of_vae_2_1():
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        module = AutoencoderKLQwenImage(base_dim=4)
    assert module.state_dict().keys() == tensors_of("vae 2.1").keys()
    assert recognize(tensors_of("t2v"), QWEN_IMAGE) is None


def test_the_decoder_is_all_of_a_vae_that_a_clip_does_not_reach():
    for case, side in (("vae 2.1", 16), ("vae 2.2", 32)):
        vae = module_of(case)
        vae.zero_grad()
        vae.encode(torch.randn(1, 3, 5, side, side)).latent_dist.mean.pow(2).sum().backward()
        silent = {name for name, parameter in vae.named_parameters() if parameter.grad is None}
        unused = keys.unused_in_vae(frozenset(name for name, _ in vae.named_modules()))
        assert silent and silent == {name for name, _ in vae.named_parameters() if is_below(name, unused)}


def test_the_last_layer_is_all_of_clip_that_the_transformer_does_not_read():
    clip = module_of("clip")
    clip.zero_grad()
    clip(torch.randn(1, 3, 28, 28), output_hidden_states=True).hidden_states[-2].pow(2).sum().backward()
    silent = {name for name, parameter in clip.named_parameters() if parameter.grad is None}
    for known in (clip.named_modules(), clip.named_parameters()):
        unused = keys.unused_in_image_encoder(frozenset(name for name, _ in known))
        assert unused == {"encoder.layers.2", "post_layernorm"}
        assert silent and silent == {name for name, _ in clip.named_parameters() if is_below(name, unused)}


def test_layers_are_counted_as_numbers():
    assert keys.unused_in_image_encoder(frozenset({"encoder.layers.9.mlp", "encoder.layers.10.mlp"})) == {
        "encoder.layers.10",
        "post_layernorm",
    }


def test_the_documented_lora_targets():
    assert ",".join(keys.LORA_TARGETS) == "q,k,v,o,ffn.0,ffn.2"
    modules = modules_with_weights({name: tuple(tensor.shape) for name, tensor in original("i2v 2.1").items()})
    found = match_targets(modules, keys.LORA_TARGETS)
    blocks = 2
    assert {target: len(addressed) for target, addressed in found.items()} == {
        **dict.fromkeys(("q", "k", "v", "o"), 2 * blocks),
        **dict.fromkeys(("ffn.0", "ffn.2"), blocks),
    }
    assert all(keys.DIT.to_targets(name) for addressed in found.values() for name in addressed)


def test_the_tiny_tensors_are_told_apart():
    """Otherwise two swapped rows could go unnoticed."""
    first = [math.fsum(tensor.flatten().double().tolist()) for tensor in tensors_of("flf2v").values()]
    assert len(set(first)) == len(first)
