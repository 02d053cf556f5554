"""What tensor names and shapes determine about an architecture, and rules for the rest. No torch."""

from collections.abc import Collection, Mapping, Sequence

from diffsynth_core.models.spec import Shapes

ROPE_PROPORTION = (16, 56, 56)
"""Rotary axes (image, height, width) of the transformers of Qwen-Image and FLUX.1 at head size 128.

At other head sizes the axes keep this proportion, each rounded to an even number.
"""
BLOCK_DIGITS = 4
"""Maximum number of digits of a block number: a tensor name may claim a billion blocks."""


def count_blocks(shapes: Collection[str], prefix: str) -> int:
    """Return the number of numbered blocks below `prefix`; numbers with more than `BLOCK_DIGITS` digits are ignored."""
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix))
    return 1 + max(
        (int(number) for number in numbers if number.isdecimal() and len(number) <= BLOCK_DIGITS), default=-1
    )


def layers_of_blocks(shapes: Shapes) -> list[str]:
    """Return the names of the linear layers in numbered blocks; the matrices of T5's position bias are embeddings."""
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)]
    in_blocks = (name for name in matrices if any(map(str.isdecimal, name.split(".")[:-1])))
    return [name for name in in_blocks if not name.endswith("relative_attention_bias")]


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def split_even(total: int, proportion: tuple[int, int, int]) -> tuple[int, int, int]:
    """Split `total` into three even parts in the given proportion; the first takes the remainder."""
    second = round(total * proportion[1] / sum(proportion) / 2) * 2
    third = round(total * proportion[2] / sum(proportion) / 2) * 2
    spare = max(0, 2 - (total - second - third))
    second, third = second - spare, third - spare
    return total - second - third, second, third


def infer_t5_encoder(shapes: Shapes) -> dict[str, object]:
    """Infer the options of `T5EncoderModel` and `UMT5EncoderModel`; the position bias determines the heads."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_blocks(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def layer_shapes(layers: Mapping[str, tuple[int, int]], bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of linear layers, given as (output channels, input channels)."""
    weights: dict[str, tuple[int, ...]] = {f"{name}.weight": sizes for name, sizes in layers.items()}
    return weights | ({f"{name}.bias": sizes[:1] for name, sizes in layers.items()} if bias else {})


def repeat_block(prefix: str, count: int, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of identical numbered blocks."""
    return {f"{prefix}.{number}.{name}": shape for number in range(count) for name, shape in shapes.items()}
