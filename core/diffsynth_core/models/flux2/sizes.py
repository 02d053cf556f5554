"""Sizes of FLUX.2's published models, for when their files are not there. No torch."""

from functools import partial

from diffsynth_core.models.shapes import layer_shapes, repeat_block
from diffsynth_core.models.size_facts import HubModelSize
from diffsynth_core.models.spec import Shapes


def transformer_shapes(
    blocks: int, single_blocks: int, heads: int, text_width: int, head_size: int = 128, channels: int = 128
) -> Shapes:
    """The tensors of `Flux2Transformer2DModel` without guidance; no layer has a bias."""
    width, hidden = heads * head_size, 3 * heads * head_size
    around = {
        "x_embedder": (width, channels),
        "context_embedder": (width, text_width),
        "time_guidance_embed.timestep_embedder.linear_1": (width, 256),
        "time_guidance_embed.timestep_embedder.linear_2": (width, width),
        "double_stream_modulation_img.linear": (6 * width, width),
        "double_stream_modulation_txt.linear": (6 * width, width),
        "single_stream_modulation.linear": (3 * width, width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (channels, width),
    }
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    layers = {f"attn.{name}": (width, width) for name in projections}
    for name in ("ff", "ff_context"):
        layers |= {f"{name}.linear_in": (2 * hidden, width), f"{name}.linear_out": (width, hidden)}
    single = {
        "attn.to_qkv_mlp_proj": (3 * width + 2 * hidden, width),
        "attn.to_out": (width, width + hidden),
    }
    norms = {f"attn.norm_{name}.weight": (head_size,) for name in ("q", "k", "added_q", "added_k")}
    single_norms = {f"attn.norm_{name}.weight": (head_size,) for name in ("q", "k")}
    return {
        **layer_shapes(around, bias=False),
        **repeat_block("transformer_blocks", blocks, {**layer_shapes(layers, bias=False), **norms}),
        **repeat_block(
            "single_transformer_blocks", single_blocks, {**layer_shapes(single, bias=False), **single_norms}
        ),
    }


PUBLISHED = (
    HubModelSize(
        "dit",
        "*-9B:*",
        9_078_581_248,
        "bfloat16",
        partial(transformer_shapes, blocks=8, single_blocks=24, heads=32, text_width=12288),
    ),
    HubModelSize(
        "dit",
        "*",
        3_875_544_576,
        "bfloat16",
        partial(transformer_shapes, blocks=5, single_blocks=20, heads=24, text_width=7680),
    ),
    HubModelSize("text_encoder", "*-9B:*", 7_568_405_504, "bfloat16"),
    HubModelSize("text_encoder", "*", 4_022_468_096, "bfloat16"),
    HubModelSize("vae", "*", 84_046_115, "bfloat16"),
)
