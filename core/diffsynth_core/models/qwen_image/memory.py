"""The forward pass of Qwen-Image's transformer as far as it keeps memory. No torch.

Source: `QwenImageTransformer2DModel` of diffusers.
"""

from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import LatentFacts, MemoryFacts
from diffsynth_core.models.tape import MediaSize, StepSizes, Tape, Value

TOKEN_SIDE = 16
"""Pixels."""
TEXT_POSITIONS = 4096
"""Rows of the table of rotary positions of which texts see a part."""


def play(tape: Tape, sizes: StepSizes) -> None:
    """One prediction. Text tokens are those of the longest caption, images shown to the text encoder among them."""
    shapes, dtype, batch = tape.network.shapes, tape.network.dtype, sizes.batch
    zero_condition = "zero_cond_t" in sizes.settings and len(sizes.images) > 1
    size = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    tokens = sum(sizes.tokens(TOKEN_SIDE))
    states = tape.linear(tape.given(batch, tokens, shapes["img_in.weight"][1], dtype=dtype), "img_in")
    text = tape.given(batch, sizes.text_tokens, shapes["txt_in.weight"][1], dtype=dtype)
    text = tape.linear(tape.rms_norm_in_steps(text, "txt_norm"), "txt_in")
    embedder = "time_text_embed.timestep_embedder"
    steps = tape.given(2 * batch if zero_condition else batch, 256, dtype=states.dtype)
    time = tape.linear(tape.activation(tape.linear(steps, f"{embedder}.linear_1")), f"{embedder}.linear_2")
    rotary = [tape.given(count, size // 2, dtype="complex64") for count in (tokens, TEXT_POSITIONS)]
    blocks = count_blocks(shapes, "transformer_blocks.")
    for number in range(blocks):
        with tape.block(states, text, time):
            block = f"transformer_blocks.{number}"
            states, text = _block(tape, block, states, text, time, rotary, zero_condition, last=number == blocks - 1)
    scale = tape.linear(tape.activation(time), "norm_out.linear")
    states = tape.multiply(tape.layer_norm(states), tape.copy(tape.view(scale, batch, 1, scale.shape[-1] // 2)))
    prediction = tape.linear(states, "proj_out")
    tape.error(prediction, batch * sizes.tokens(TOKEN_SIDE)[0] * prediction.shape[-1])


def _block(
    tape: Tape,
    name: str,
    states: Value,
    text: Value,
    time: Value,
    rotary: list[Value],
    zero_condition: bool,
    last: bool,
) -> tuple[Value, Value]:
    """(states, text) behind a block; the text behind the last one is read by nothing, and not kept."""
    changes = tape.linear(tape.activation(time), f"{name}.img_mod.1")
    text_changes = tape.linear(tape.activation(time), f"{name}.txt_mod.1")
    changed, gate = _modulate(tape, states, changes, zero_condition)
    text_changed, text_gate = _modulate(tape, text, text_changes, False)
    image = _projections(tape, f"{name}.attn", ("to_{}", "norm_{}"), changed, rotary[0])
    caption = _projections(tape, f"{name}.attn", ("add_{}_proj", "norm_added_{}"), text_changed, rotary[1])
    query, key, value = (tape.concatenate(*both, axis=1) for both in zip(caption, image, strict=True))
    joint = tape.attention(query, key, value)
    attended = tape.linear(tape.cut(joint, *states.shape), f"{name}.attn.to_out.0")
    states = tape.add(states, tape.multiply(gate, attended))
    changed, gate = _modulate(tape, states, changes, zero_condition)
    states = tape.add(states, tape.multiply(gate, _feed_forward(tape, f"{name}.img_mlp", changed)))
    if last:
        return states, text
    attended = tape.linear(tape.cut(joint, *text.shape), f"{name}.attn.to_add_out")
    text = tape.add(text, tape.multiply(text_gate, attended))
    text_changed, text_gate = _modulate(tape, text, text_changes, False)
    return states, tape.add(text, tape.multiply(text_gate, _feed_forward(tape, f"{name}.txt_mlp", text_changed)))


def _modulate(tape: Tape, states: Value, changes: Value, by_token: bool) -> tuple[Value, Value]:
    """(normed, scaled and shifted states, gate); `by_token`: with numbers of its own for each token."""
    batch, length, width = states.shape
    part = tape.view(changes, batch, 1, width)
    if by_token:
        shift, scale, gate = (tape.chosen(part, batch, length, width) for _ in range(3))
    else:
        shift = scale = gate = part
    return tape.add(tape.multiply(tape.layer_norm(states), tape.copy(scale)), shift), gate


def _projections(tape: Tape, name: str, layers: tuple[str, str], states: Value, rotary: Value) -> list[Value]:
    """Queries, keys and values of one side, `[B, L, heads, size]`."""
    layer, norm = layers
    size = 2 * rotary.shape[-1]
    found = []
    for part in ("q", "k", "v"):
        made = tape.linear(states, f"{name}.{layer.format(part)}")
        heads = tape.view(made, *made.shape[:2], made.shape[-1] // size, size)
        if part != "v":
            normed = tape.rms_norm_in_steps(heads, f"{name}.{norm.format(part)}")
            heads = tape.turn(normed, tape.view(rotary, *rotary.shape))
        found.append(heads)
    return found


def _feed_forward(tape: Tape, name: str, states: Value) -> Value:
    return tape.linear(tape.activation(tape.linear(states, f"{name}.net.0.proj")), f"{name}.net.2")


def encoding_numbers(latents: LatentFacts, image: MediaSize) -> int:
    """Ten maps of 96 channels at the size of the image: a convolution over time pads one frame to three.

    Counted on diffusers' `AutoencoderKLQwenImage`; a test counts again.
    """
    _, height, width = image
    return 10 * 96 * height * width


MEMORY = MemoryFacts(play, encoding_numbers)
