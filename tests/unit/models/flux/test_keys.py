"""FLUX.1's keys: each key map against tiny modules in both directions, and against diffusers' own converters."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.models.flux import keys
from diffsynth_core.models.flux.components import build
from diffsynth_core.models.flux.spec import FLUX
from diffsynth_core.models.recognition import recognize
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import is_below, match_targets, modules_with_weights
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap, TableMap

TRANSFORMER = {
    "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64,
    "joint_attention_dim": 12, "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
LEVELS = 4
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * LEVELS, "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
    "block_out_channels": [4, 8, 12, 16], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SETTINGS: dict[str, dict[str, object]] = {"dit": TRANSFORMER, "text_encoder_1": CLIP, "text_encoder_2": T5, "vae": VAE}
TABLES: dict[str, tuple[str, KeyMap]] = {
    "original transformer": ("dit", keys.DIT_ORIGINAL),
    "documented transformer": ("dit", keys.DIT),
    "original vae": ("vae", keys.VAE_ORIGINAL),
    "clip": ("text_encoder_1", keys.CLIP),
    "t5": ("text_encoder_2", keys.T5),
}


@cache
def module_of(component: str) -> nn.Module:
    torch.manual_seed(0)
    module = build(component, SETTINGS[component])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@cache
def tensors_of(component: str) -> dict[str, Tensor]:
    """Return the tensors of a module as in a file: a tied tensor once."""
    state = module_of(component).state_dict()
    return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}


def in_names_of(table: KeyMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    assert all(table.to_source(name) for name in tensors)
    return {name: table.fuse(name, tensors) for name in table.to_sources(tensors)}


@pytest.mark.parametrize("case", TABLES)
def test_tensors_go_there_and_back_bit_for_bit(case):
    component, table = TABLES[case]
    tensors = tensors_of(component)
    theirs = in_names_of(table, tensors)
    back: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        cut = table.split(name, tensor)
        assert {key: tuple(part.shape) for key, part in cut.items()} == table.split_shape(name, tuple(tensor.shape))
        assert not back.keys() & cut.keys()
        back |= cut
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    again = {name: table.fuse(name, back) for name in theirs}
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("table", "theirs"),
    [
        (keys.DIT_ORIGINAL, in_names_of(keys.DIT_ORIGINAL, tensors_of("dit"))),
        (keys.DIT_DOCUMENTED, in_names_of(keys.DIT, tensors_of("dit"))),
        (keys.VAE_ORIGINAL, in_names_of(keys.VAE_ORIGINAL, tensors_of("vae"))),
        (keys.T5, tensors_of("text_encoder_2")),
    ],
    ids=["original transformer", "documented transformer", "original vae", "t5"],
)
def test_every_row_of_a_table_names_a_part_of_a_real_module(table: TableMap, theirs):
    assert {table.rule(name) for name in theirs} == table.rules.keys()


def test_diffusers_converts_the_transformer_alike():
    """Only at width 3072, which diffusers' converter assumes."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        module = build("dit", TRANSFORMER | {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1})
    generator = torch.Generator().manual_seed(0)
    # Numbered rows tell where each came from; whole matrices would take gigabytes.
    tensors = {
        name: torch.randint(1 << 30, (tensor.shape[0],), generator=generator)[(...,) + (None,) * (tensor.ndim - 1)]
        for name, tensor in module.state_dict().items()
    }
    converted = convert_flux_transformer_checkpoint_to_diffusers(in_names_of(keys.DIT_ORIGINAL, tensors))
    check_equal(converted, tensors)


def test_diffusers_converts_the_vae_alike():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    original = in_names_of(keys.VAE_ORIGINAL, tensors_of("vae"))
    assert original["encoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
    check_equal(convert_ldm_vae_checkpoint(original, VAE), tensors_of("vae"))


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_documented_names_hold_the_original_tensors():
    original = in_names_of(keys.DIT_ORIGINAL, tensors_of("dit"))
    documented = in_names_of(keys.DIT, tensors_of("dit"))
    assert len(documented) == len(original)
    for name, tensor in documented.items():
        (theirs,) = keys.DIT_DOCUMENTED.to_targets(name)
        assert torch.equal(tensor, original[theirs])


@pytest.mark.parametrize(
    ("table", "theirs", "ours"),
    [
        (keys.DIT_ORIGINAL, "double_blocks.18.txt_attn.norm.key_norm.scale", ("transformer_blocks.18.attn.norm_added_k.weight",)),
        (keys.DIT_ORIGINAL, "double_blocks.3.txt_mod.lin.bias", ("transformer_blocks.3.norm1_context.linear.bias",)),
        (keys.DIT_ORIGINAL, "vector_in.out_layer.weight", ("time_text_embed.text_embedder.linear_2.weight",)),
        (keys.DIT_ORIGINAL, "final_layer.linear.bias", ("proj_out.bias",)),
        (keys.DIT, "blocks.0.attn.a_to_qkv", tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv")),
        (keys.DIT, "blocks.7.attn.b_to_qkv.bias", tuple(f"transformer_blocks.7.attn.add_{part}_proj.bias" for part in "qkv")),
        (keys.DIT, "blocks.7.attn.b_to_out.weight", ("transformer_blocks.7.attn.to_add_out.weight",)),
        (keys.DIT, "blocks.2.ff_b.2", ("transformer_blocks.2.ff_context.net.2",)),
        (keys.DIT, "blocks.2.norm1_a.linear", ("transformer_blocks.2.norm1.linear",)),
        (keys.DIT, "single_blocks.37.proj_out", ("single_transformer_blocks.37.proj_out",)),
        (keys.DIT, "single_blocks.37.norm.linear", ("single_transformer_blocks.37.norm.linear",)),
        (keys.DIT, "final_norm_out.linear.weight", ("norm_out.linear.weight",)),
        (keys.VAE_ORIGINAL, "decoder.up.3.block.2.conv1.weight", ("decoder.up_blocks.0.resnets.2.conv1.weight",)),
        (keys.VAE_ORIGINAL, "decoder.up.0.block.0.nin_shortcut.bias", ("decoder.up_blocks.3.resnets.0.conv_shortcut.bias",)),
        (keys.VAE_ORIGINAL, "encoder.mid.block_2.norm1.weight", ("encoder.mid_block.resnets.1.norm1.weight",)),
        (keys.VAE_ORIGINAL, "encoder.down.2.downsample.conv.bias", ("encoder.down_blocks.2.downsamplers.0.conv.bias",)),
        (keys.CLIP, "text_model.final_layer_norm.weight", ("final_layer_norm.weight",)),
    ],
)  # fmt: skip
def test_names_of_the_published_files(table: KeyMap, theirs, ours):
    assert table.to_targets(theirs) == ours
    assert {table.to_source(name) for name in ours} == {theirs}


@pytest.mark.parametrize(("module", "parts"), [("to_qkv_mlp", "single_blocks.1.linear1"), ("a_to_qkv", None)])
def test_fused_projections_hold_their_parts_in_this_order(module, parts):
    tensors = tensors_of("dit")
    if parts:
        fused = in_names_of(keys.DIT_ORIGINAL, tensors)[f"{parts}.weight"]
        prefix, rows = "single_transformer_blocks.1.", (32, 32, 32, 128)
        ours = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    else:
        fused = in_names_of(keys.DIT, tensors)[f"blocks.1.attn.{module}.weight"]
        prefix, rows, ours = "transformer_blocks.1.", (32, 32, 32), ("attn.to_q", "attn.to_k", "attn.to_v")
    assert fused.shape == (sum(rows), 32)
    for part, name in zip(fused.split(rows), ours, strict=True):
        assert torch.equal(part, tensors[f"{prefix}{name}.weight"])


def test_the_last_modulation_has_the_shift_first():
    tensors = tensors_of("dit")
    scale, shift = tensors["norm_out.linear.bias"].chunk(2)
    original = in_names_of(keys.DIT_ORIGINAL, tensors)["final_layer.adaLN_modulation.1.bias"]
    assert torch.equal(original, torch.cat([shift, scale]))
    assert torch.equal(in_names_of(keys.DIT, tensors)["final_norm_out.linear.bias"], original)


def test_the_embedding_of_t5_has_one_name():
    """Its second name is ignored in files, and not written."""
    module = module_of("text_encoder_2")
    assert keys.T5.to_targets("encoder.embed_tokens.weight") == ()
    assert keys.T5.to_sources(module.state_dict()) == list(tensors_of("text_encoder_2"))


def test_names_of_other_models_are_unknown():
    """FLUX.2 has one modulation for all blocks, ControlNets have additional blocks."""
    assert keys.DIT_ORIGINAL.to_targets("double_stream_modulation_img.lin.weight") is None
    assert keys.DIT_ORIGINAL.to_source("controlnet_blocks.0.weight") is None
    assert keys.VAE_ORIGINAL.to_targets("encoder.quant_conv.weight") is None


LAYOUTS = {
    ("dit", "original"): (0, keys.DIT_ORIGINAL),
    ("dit", "diffusers"): (1, SAME_NAMES),
    ("dit", "documented"): (2, keys.DIT),
    ("text_encoder_1", "published"): (0, keys.CLIP),
    ("text_encoder_1", "flat"): (1, SAME_NAMES),
    ("text_encoder_2", "published"): (0, keys.T5),
    ("vae", "original"): (0, keys.VAE_ORIGINAL),
    ("vae", "diffusers"): (1, SAME_NAMES),
}


@pytest.mark.parametrize("case", LAYOUTS, ids=" ".join)
def test_each_layout_is_recognized_and_no_other_family_takes_it(case):
    component, (place, table) = case[0], LAYOUTS[case]
    present = in_names_of(table, tensors_of(component)).keys()
    layouts = [(facts.name, layout) for facts in FLUX.components for layout in facts.layouts]
    fitting = [(name, layout) for name, layout in layouts if layout.signature <= present]
    assert fitting == [(component, FLUX.component(component).layouts[place])]
    assert fitting[0][1].names == table
    for facts in FAMILIES.values():
        if facts is not FLUX and component == "dit":
            assert recognize(present, facts) is None
    assert not any(known.signature <= present for known in FLUX.lookalikes)


def test_umt5_and_the_vae_of_flux_2_are_lookalikes():
    from diffusers import AutoencoderKLFlux2
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        modules = UMT5EncoderModel(UMT5Config(**T5)), AutoencoderKLFlux2()
    reported = [
        [known.title for known in FLUX.lookalikes if known.signature <= module.state_dict().keys()]
        for module in modules
    ]
    assert reported == [["the UMT5 text encoder of Wan"], ["the VAE of FLUX.2"]]


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_other_transformers_are_not_taken_for_it():
    from diffusers import Flux2Transformer2DModel, SD3Transformer2DModel

    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    with torch.device("meta"):
        others = [
            Flux2Transformer2DModel(**sizes, num_single_layers=1),
            SD3Transformer2DModel(**sizes, caption_projection_dim=32),
        ]
    for other in others:
        assert recognize(other.state_dict().keys(), FLUX) is None


def test_every_parameter_of_the_transformer_and_the_text_encoders_is_reached():
    transformer = module_of("dit")
    transformer.zero_grad()
    transformer(
        hidden_states=torch.randn(1, 6, 64),
        encoder_hidden_states=torch.randn(1, 5, 12),
        pooled_projections=torch.randn(1, 8),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample.pow(2).sum().backward()
    clip, t5 = module_of("text_encoder_1"), module_of("text_encoder_2")
    tokens = torch.arange(2, 50)[None]
    for encoder, output in ((clip, "pooler_output"), (t5, "last_hidden_state")):
        encoder.zero_grad()
        getattr(encoder(tokens), output).pow(2).sum().backward()
    for component in ("dit", "text_encoder_1", "text_encoder_2"):
        silent = [name for name, parameter in module_of(component).named_parameters() if parameter.grad is None]
        assert silent == [] == list(FLUX.component(component).unused_params(frozenset({"transformer_blocks.1.attn"})))


def test_the_decoder_is_all_of_the_vae_that_an_image_does_not_reach():
    vae = module_of("vae")
    vae.zero_grad()
    vae.encode(torch.randn(1, 3, 16, 16)).latent_dist.mode().pow(2).sum().backward()
    silent = {name for name, parameter in vae.named_parameters() if parameter.grad is None}
    unused = keys.unused_in_vae(frozenset(name for name, _ in vae.named_modules()))
    assert silent and silent == {name for name, _ in vae.named_parameters() if is_below(name, unused)}


def test_the_documented_lora_targets():
    assert ",".join(keys.LORA_TARGETS) == (
        "a_to_qkv,b_to_qkv,ff_a.0,ff_a.2,ff_b.0,ff_b.2,a_to_out,b_to_out,proj_out,norm.linear,norm1_a.linear,"
        "norm1_b.linear,to_qkv_mlp"
    )
    documented = in_names_of(keys.DIT, tensors_of("dit"))
    modules = modules_with_weights({name: tuple(tensor.shape) for name, tensor in documented.items()})
    found = match_targets(modules, keys.LORA_TARGETS)
    double, single = 2, 3
    assert {target: len(addressed) for target, addressed in found.items()} == {
        **dict.fromkeys(keys.LORA_TARGETS, double),
        **dict.fromkeys(("proj_out", "norm.linear", "to_qkv_mlp"), single),
    }
    own = {module for addressed in found.values() for name in addressed for module in keys.DIT.to_targets(name)}
    linear = {name for name, module in module_of("dit").named_modules() if isinstance(module, nn.Linear)}
    outside = {name for name in linear if "blocks" not in name}
    assert own == linear - outside, "every linear layer of every block"
