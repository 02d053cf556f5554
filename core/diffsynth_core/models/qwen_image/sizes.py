"""Sizes of Qwen-Image's published models, for when their files are not there. No torch."""

from functools import partial

from diffsynth_core.models.shapes import layer_shapes, repeat_block
from diffsynth_core.models.size_facts import HubModelSize
from diffsynth_core.models.spec import Shapes

TEXT_WIDTH = 3584
HEAD_SIZE = 128


def transformer_shapes(blocks: int, heads: int, head_size: int = HEAD_SIZE, text_width: int = TEXT_WIDTH) -> Shapes:
    """The tensors of `QwenImageTransformer2DModel`, which reads and makes 64 channels."""
    width = heads * head_size
    embedder = "time_text_embed.timestep_embedder"
    around = {
        "img_in": (width, 64),
        "txt_in": (width, text_width),
        f"{embedder}.linear_1": (width, 256),
        f"{embedder}.linear_2": (width, width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (64, width),
    }
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    layers = {f"attn.{name}": (width, width) for name in projections}
    for side in ("img", "txt"):
        layers |= {
            f"{side}_mod.1": (6 * width, width),
            f"{side}_mlp.net.0.proj": (4 * width, width),
            f"{side}_mlp.net.2": (width, 4 * width),
        }
    norms = {f"attn.norm_{name}.weight": (head_size,) for name in ("q", "k", "added_q", "added_k")}
    block = repeat_block("transformer_blocks", blocks, {**layer_shapes(layers), **norms})
    return {**layer_shapes(around), "txt_norm.weight": (text_width,), **block}


PUBLISHED = (
    HubModelSize("dit", "*", 20_430_401_088, "bfloat16", partial(transformer_shapes, blocks=60, heads=24)),
    HubModelSize("text_encoder", "*", 8_292_166_656, "bfloat16"),
    HubModelSize("vae", "*", 126_892_531, "bfloat16"),
)
