"""Sizes of Wan's published models, for when their files are not there. No torch."""

import math
from functools import partial

from diffsynth_core.models.shapes import layer_shapes, repeat_block
from diffsynth_core.models.size_facts import HubModelSize
from diffsynth_core.models.spec import Shapes

LARGEST_HEAD_SIZE = 128
"""Size of an attention head of every published transformer: shapes give only heads times size."""


def head_size(width: int) -> int:
    """Of a transformer of `width` channels: 128 where it divides them, else the largest power of two that does."""
    return math.gcd(width, LARGEST_HEAD_SIZE)


def transformer_shapes(
    blocks: int,
    width: int,
    hidden: int,
    taken: int = 16,
    made: int = 16,
    text_width: int = 4096,
    image_width: int = 0,
    image_positions: int = 0,
) -> Shapes:
    """The tensors of `WanTransformer3DModel`, with an embedder of images where `image_width` is not 0, which tells the
    places of `image_positions` states apart where that is not 0."""
    around = {
        "condition_embedder.time_embedder.linear_1": (width, 256),
        "condition_embedder.time_embedder.linear_2": (width, width),
        "condition_embedder.time_proj": (6 * width, width),
        "condition_embedder.text_embedder.linear_1": (width, text_width),
        "condition_embedder.text_embedder.linear_2": (width, width),
        "proj_out": (4 * made, width),
    }
    attentions = {place: ["to_q", "to_k", "to_v", "to_out.0"] for place in ("attn1", "attn2")}
    norms = {place: ["norm_q", "norm_k"] for place in ("attn1", "attn2")}
    shapes: dict[str, tuple[int, ...]] = {}
    if image_width:
        embedder = "condition_embedder.image_embedder"
        around |= {
            f"{embedder}.ff.net.0.proj": (image_width, image_width),
            f"{embedder}.ff.net.2": (width, image_width),
        }
        shapes |= _norm(f"{embedder}.norm1", image_width) | _norm(f"{embedder}.norm2", width)
        shapes |= {f"{embedder}.pos_embed": (1, image_positions, image_width)} if image_positions else {}
        attentions["attn2"] += ["add_k_proj", "add_v_proj"]
        norms["attn2"] += ["norm_added_k"]
    layers = {f"{place}.{name}": (width, width) for place, names in attentions.items() for name in names}
    layers |= {"ffn.net.0.proj": (hidden, width), "ffn.net.2": (width, hidden)}
    scales = {f"{place}.{name}.weight": (width,) for place, names in norms.items() for name in names}
    block = {**layer_shapes(layers), **scales, **_norm("norm2", width), "scale_shift_table": (1, 6, width)}
    return {
        "patch_embedding.weight": (width, taken, 1, 2, 2),
        "patch_embedding.bias": (width,),
        "scale_shift_table": (1, 2, width),
        **shapes,
        **layer_shapes(around),
        **repeat_block("blocks", blocks, block),
    }


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


LARGE = partial(transformer_shapes, blocks=40, width=5120, hidden=13824)
SMALL = partial(transformer_shapes, blocks=30, width=1536, hidden=8960)
PUBLISHED = (
    HubModelSize("dit", "*T2V-1.3B:*", 1_418_996_800, "float32", SMALL),
    HubModelSize("dit", "*Wan2.1-I2V-14B*:*", 16_394_878_784, "bfloat16", partial(LARGE, taken=36, image_width=1280)),
    HubModelSize(
        "dit",
        "*Wan2.1-FLF2V-14B*:*",
        16_395_536_704,
        "bfloat16",
        partial(LARGE, taken=36, image_width=1280, image_positions=514),
    ),
    HubModelSize("dit", "*Wan2.2-I2V-A14B:*", 14_288_901_184, "bfloat16", partial(LARGE, taken=36)),
    HubModelSize("dit", "*Wan2.2-Fun-A14B-InP:*", 14_288_901_184, "bfloat16", partial(LARGE, taken=36)),
    HubModelSize(
        "dit", "*Wan2.1-Fun-*14B-InP:*", 16_394_878_784, "bfloat16", partial(LARGE, taken=36, image_width=1280)
    ),
    HubModelSize(
        "dit", "*Wan2.1-Fun-*1.3B-InP:*", 1_564_428_608, "bfloat16", partial(SMALL, taken=36, image_width=1280)
    ),
    HubModelSize(
        "dit",
        "*TI2V-5B:*",
        4_999_787_712,
        "bfloat16",
        partial(transformer_shapes, blocks=30, width=3072, hidden=14336, taken=48, made=48),
    ),
    HubModelSize("dit", "*T2V*14B:*", 14_288_491_584, "bfloat16", LARGE),
    HubModelSize("text_encoder", "*", 5_680_910_336, "bfloat16"),
    HubModelSize("vae", "*Wan2.2_VAE*", 704_688_668, "float32"),
    HubModelSize("vae", "*", 126_892_531, "float32"),
    HubModelSize("image_encoder", "*", 632_076_801, "bfloat16"),
)
