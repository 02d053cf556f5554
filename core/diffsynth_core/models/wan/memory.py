"""The forward pass of Wan's transformer as far as it keeps memory. No torch.

Source: `WanTransformer3DModel` of diffusers.
"""

from typing import NamedTuple

from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import LatentFacts, MemoryFacts
from diffsynth_core.models.spec import Shapes
from diffsynth_core.models.tape import MediaSize, StepSizes, Tape, Value
from diffsynth_core.models.wan.captions import MAX_TOKENS
from diffsynth_core.models.wan.sizes import head_size

FRAMES_PER_LATENT = 4
"""Frames of a clip in one latent frame; the first latent frame holds one."""
IMAGE_TOKENS = 257
"""Of one image shown to the image encoder."""
WIDE = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Parts whose weights diffusers keeps in float32 (`_keep_in_fp32_modules`)."""
EMBEDDER = "condition_embedder"


def play(tape: Tape, sizes: StepSizes) -> None:
    """One prediction."""
    shapes, dtype, batch = tape.network.shapes, tape.network.dtype, sizes.batch
    width, _, *patch = shapes["patch_embedding.weight"]
    latents = latent_shape(shapes, batch, sizes.images[0])
    tokens = latents[2] * (latents[3] // patch[1]) * (latents[4] // patch[2])
    states = tape.copy(tape.convolution(tape.given(*latents, dtype=dtype), "patch_embedding", batch, tokens, width))
    times = tokens if sizes.given else 1
    time, changes = _times(tape, batch, times)
    text = tape.given(batch, MAX_TOKENS, shapes[f"{EMBEDDER}.text_embedder.linear_1.weight"][1], dtype=dtype)
    hidden = tape.activation(tape.linear(text, f"{EMBEDDER}.text_embedder.linear_1"))
    text = tape.linear(hidden, f"{EMBEDDER}.text_embedder.linear_2")
    shown = _shown(tape, batch)
    if shown:
        text = tape.concatenate(shown, text, axis=1)
    size = head_size(width)
    rotary = tape.given(tokens, size), tape.given(tokens, size)
    for number in range(count_blocks(shapes, "blocks.")):
        with tape.block(states, text, changes):
            states = _block(tape, f"blocks.{number}", states, text, changes, rotary)
    table = tape.added(tape.weight("scale_shift_table"), time, batch, times, 2, width)
    prediction = tape.linear(_modulate(tape, states, table), "proj_out")
    tape.error(prediction, prediction.count)


def latent_shape(shapes: Shapes, batch: int, clip: tuple[int, int, int]) -> tuple[int, int, int, int, int]:
    """What the transformer takes of a clip, `[B, C, F, h, w]`; of TI2V a latent is 16 pixels wide, of others 8."""
    channels = shapes["patch_embedding.weight"][1]
    pixels = 16 if channels == 48 else 8
    frames, height, width = clip
    return batch, channels, (frames - 1) // FRAMES_PER_LATENT + 1, height // pixels, width // pixels


def _times(tape: Tape, batch: int, times: int) -> tuple[Value, Value]:
    """(the timestep, the modulation of all blocks), for each clip or each token."""
    shapes = tape.network.shapes
    steps = tape.given(batch, times, shapes[f"{EMBEDDER}.time_embedder.linear_1.weight"][1])
    hidden = tape.activation(tape.linear(steps, f"{EMBEDDER}.time_embedder.linear_1"))
    time = tape.cast(tape.linear(hidden, f"{EMBEDDER}.time_embedder.linear_2"), tape.network.dtype)
    return time, tape.linear(tape.activation(time), f"{EMBEDDER}.time_proj")


def _shown(tape: Tape, batch: int) -> Value | None:
    """The states of images that are shown, where the transformer has an embedder of them."""
    name = f"{EMBEDDER}.image_embedder"
    shapes = tape.network.shapes
    if f"{name}.norm1.weight" not in shapes:
        return None
    positions = f"{name}.pos_embed"
    tokens = shapes[positions][1] if positions in shapes else IMAGE_TOKENS
    states = tape.given(batch, tokens, shapes[f"{name}.norm1.weight"][0], dtype=tape.network.dtype)
    if positions in shapes:
        states = tape.add(states, tape.weight(positions))
    states = _normed(tape, states, f"{name}.norm1")
    states = tape.linear(tape.activation(tape.linear(states, f"{name}.ff.net.0.proj")), f"{name}.ff.net.2")
    return _normed(tape, states, f"{name}.norm2")


def _block(tape: Tape, name: str, states: Value, text: Value, changes: Value, rotary: tuple[Value, Value]) -> Value:
    """States behind a block: attention to themselves, to the text, and two layers."""
    batch, _, width = states.shape
    times = changes.shape[1]
    table = tape.added(tape.weight(f"{name}.scale_shift_table"), changes, batch, times, 6, width)
    gate = tape.view(table, batch, times, width)
    attended = _attention(tape, f"{name}.attn1", _modulate(tape, states, table), None, rotary)
    states = tape.cast(tape.add(tape.cast(states, "float32"), tape.multiply(attended, gate)), states.dtype)
    normed = _normed(tape, states, f"{name}.norm2") if f"{name}.norm2.weight" in tape.network.shapes else states
    states = tape.add(states, _attention(tape, f"{name}.attn2", normed, text, None))
    hidden = tape.activation(tape.linear(_modulate(tape, states, table), f"{name}.ffn.net.0.proj"))
    made = tape.cast(tape.linear(hidden, f"{name}.ffn.net.2"), "float32")
    return tape.cast(tape.add(tape.cast(states, "float32"), tape.multiply(made, gate)), states.dtype)


def _attention(
    tape: Tape, name: str, states: Value, context: Value | None, rotary: tuple[Value, Value] | None
) -> Value:
    """Attention of states to themselves or to a context, whose first tokens may be those of images."""
    shapes = tape.network.shapes
    images = f"{name}.add_k_proj.weight" in shapes
    texts = context or states
    if context and images:
        texts = tape.cut(context, context.shape[0], MAX_TOKENS, context.shape[-1])
    query = tape.rms_norm(tape.linear(states, f"{name}.to_q"), f"{name}.norm_q")
    key = tape.rms_norm(tape.linear(texts, f"{name}.to_k"), f"{name}.norm_k")
    value = tape.linear(texts, f"{name}.to_v")
    query, key, value = (_heads(tape, part) for part in (query, key, value))
    if rotary:
        query, key = tape.turn_in_parts(query, *rotary), tape.turn_in_parts(key, *rotary)
    seen = None
    if context and images:
        shown = tape.cut(context, context.shape[0], context.shape[1] - MAX_TOKENS, context.shape[-1])
        image_key = tape.rms_norm(tape.linear(shown, f"{name}.add_k_proj"), f"{name}.norm_added_k")
        image_value = tape.linear(shown, f"{name}.add_v_proj")
        seen = tape.attention(query, _heads(tape, image_key), _heads(tape, image_value))
    joint = tape.attention(query, key, value)
    if seen:
        joint = tape.add(joint, seen)
    return tape.linear(tape.view(joint, *states.shape), f"{name}.to_out.0")


def _heads(tape: Tape, states: Value) -> Value:
    """`[B, L, C]` as `[B, L, heads, size]`."""
    size = head_size(states.shape[-1])
    return tape.view(states, *states.shape[:2], states.shape[-1] // size, size)


def _modulate(tape: Tape, states: Value, table: Value) -> Value:
    """Normed in float32, scaled by one and a number for each channel, and shifted."""
    batch, times, _, width = table.shape
    part = tape.view(table, batch, times, width)
    changed = tape.multiply(tape.layer_norm(tape.cast(states, "float32")), tape.copy(part))
    return tape.cast(tape.add(changed, part), states.dtype)


def _normed(tape: Tape, states: Value, scale: str) -> Value:
    """In float32, with a scale."""
    return tape.cast(tape.layer_norm(tape.cast(states, "float32"), scale), states.dtype)


class EncoderWork(NamedTuple):
    """What a VAE's encoder holds for each pixel of a frame at its fullest.

    `channels`: of a map at the size of the frames, for each of their pixels. `one_frame`, `four_frames`: such maps,
    while it works on the first frame and on four later ones, with what a convolution over time pads them with and keeps
    for the next four. `pixels`: for each frame of the clip, the values of its pixels as often as they are there.
    """

    channels: int
    one_frame: int
    four_frames: int
    pixels: int


ENCODERS = {8: EncoderWork(96, 10, 39, 3), 16: EncoderWork(160 // 4, 12, 47, 6)}
"""By the side of a latent in pixels. The VAE of Wan 2.2 (16) has 160 channels for each square of 2 x 2 pixels. Counted
on diffusers' `AutoencoderKLWan`; a test counts again."""


def encoding_numbers(latents: LatentFacts, image: MediaSize) -> int:
    """The first frame alone, the others four at a time."""
    frames, height, width = image
    work = ENCODERS[latents.factor]
    maps = work.one_frame if frames == 1 else work.four_frames
    return (work.channels * maps + work.pixels * frames) * height * width


MEMORY = MemoryFacts(play, encoding_numbers, WIDE)
