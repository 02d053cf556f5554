"""Sizes of FLUX.1's published models, for when their files are not there. No torch."""

from functools import partial

from diffsynth_core.models.shapes import layer_shapes, repeat_block
from diffsynth_core.models.size_facts import HubModelSize
from diffsynth_core.models.spec import Shapes


def transformer_shapes(
    blocks: int, single_blocks: int, heads: int, head_size: int = 128, text_width: int = 4096, pooled_width: int = 768
) -> Shapes:
    """The tensors of `FluxTransformer2DModel` with guidance, which reads and makes 64 channels."""
    width = heads * head_size
    around = {
        "x_embedder": (width, 64),
        "context_embedder": (width, text_width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (64, width),
    }
    for name, taken in (("timestep_embedder", 256), ("guidance_embedder", 256), ("text_embedder", pooled_width)):
        around |= {
            f"time_text_embed.{name}.linear_1": (width, taken),
            f"time_text_embed.{name}.linear_2": (width, width),
        }
    own, context = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    layers = {f"attn.{name}": (width, width) for name in (*own, *context)}
    layers |= {"norm1.linear": (6 * width, width), "norm1_context.linear": (6 * width, width)}
    for name in ("ff", "ff_context"):
        layers |= {f"{name}.net.0.proj": (4 * width, width), f"{name}.net.2": (width, 4 * width)}
    single = {
        **{f"attn.{name}": (width, width) for name in own},
        "norm.linear": (3 * width, width),
        "proj_mlp": (4 * width, width),
        "proj_out": (width, 5 * width),
    }
    norms = {f"attn.norm_{name}.weight": (head_size,) for name in ("q", "k", "added_q", "added_k")}
    single_norms = {f"attn.norm_{name}.weight": (head_size,) for name in ("q", "k")}
    return {
        **layer_shapes(around),
        **repeat_block("transformer_blocks", blocks, {**layer_shapes(layers), **norms}),
        **repeat_block("single_transformer_blocks", single_blocks, {**layer_shapes(single), **single_norms}),
    }


PUBLISHED = (
    HubModelSize(
        "dit", "*", 11_901_408_320, "bfloat16", partial(transformer_shapes, blocks=19, single_blocks=38, heads=24)
    ),
    HubModelSize("text_encoder_1", "*", 123_060_480, "bfloat16"),
    HubModelSize("text_encoder_2", "*", 4_762_310_656, "bfloat16"),
    HubModelSize("vae", "*", 83_819_683, "float32"),
    HubModelSize("controlnet", "jasperai/Flux.1-dev-Controlnet-*:*", 1_791_605_248, "bfloat16"),
)
