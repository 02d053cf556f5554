"""The forward pass of FLUX.2's transformer as far as it keeps memory. No torch.

Source: `Flux2Transformer2DModel` of diffusers.
"""

from diffsynth_core.models.flux2.captions import MAX_TOKENS
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import LatentFacts, MemoryFacts
from diffsynth_core.models.tape import MediaSize, StepSizes, Tape, Value

TOKEN_SIDE = 16
"""Pixels."""


def play(tape: Tape, sizes: StepSizes) -> None:
    """One prediction."""
    shapes, dtype, batch = tape.network.shapes, tape.network.dtype, sizes.batch
    tokens = sum(sizes.tokens(TOKEN_SIDE))
    size = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    given = "float32" if tape.autocast else dtype
    embedder = "time_guidance_embed.timestep_embedder"
    steps = tape.given(batch, shapes[f"{embedder}.linear_1.weight"][1], dtype=given)
    time = tape.linear(tape.activation(tape.linear(steps, f"{embedder}.linear_1")), f"{embedder}.linear_2")
    modulations = [
        tape.linear(tape.activation(time), f"{name}.linear")
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    ]
    states = tape.linear(tape.given(batch, tokens, shapes["x_embedder.weight"][1], dtype=given), "x_embedder")
    text = tape.given(batch, MAX_TOKENS, shapes["context_embedder.weight"][1], dtype=dtype)
    text = tape.linear(text, "context_embedder")
    rotary = tape.given(MAX_TOKENS + tokens, size), tape.given(MAX_TOKENS + tokens, size)
    for number in range(count_blocks(shapes, "transformer_blocks.")):
        with tape.block(states, text, *modulations[:2]):
            states, text = _block(tape, f"transformer_blocks.{number}", states, text, modulations, rotary)
    joint = tape.concatenate(text, states, axis=1)
    for number in range(count_blocks(shapes, "single_transformer_blocks.")):
        with tape.block(joint, modulations[2]):
            joint = _single_block(tape, f"single_transformer_blocks.{number}", joint, modulations[2], rotary)
    changes = tape.linear(tape.cast(tape.activation(time), joint.dtype), "norm_out.linear")
    states = _modulate(tape, tape.view(joint, *states.shape), changes)
    prediction = tape.linear(states, "proj_out")
    tape.error(prediction, batch * sizes.tokens(TOKEN_SIDE)[0] * prediction.shape[-1])


def _block(
    tape: Tape, name: str, states: Value, text: Value, modulations: list[Value], rotary: tuple[Value, Value]
) -> tuple[Value, Value]:
    """(states, text) behind a block of two streams."""
    changes, text_changes, _ = modulations
    changed, text_changed = _modulate(tape, states, changes), _modulate(tape, text, text_changes)
    image = _projections(tape, f"{name}.attn", ("to_{}", "norm_{}"), changed)
    caption = _projections(tape, f"{name}.attn", ("add_{}_proj", "norm_added_{}"), text_changed)
    query, key, value = (tape.concatenate(*both, axis=1) for both in zip(caption, image, strict=True))
    joint = tape.attention(tape.turn_in_parts(query, *rotary), tape.turn_in_parts(key, *rotary), value)
    text_attended = tape.linear(tape.cut(joint, *text.shape), f"{name}.attn.to_add_out")
    attended = tape.linear(tape.cut(joint, *states.shape), f"{name}.attn.to_out.0")
    states = tape.add(states, tape.multiply(_gate(tape, states, changes), attended))
    states = _fed_forward(tape, f"{name}.ff", states, changes)
    text = tape.add(text, tape.multiply(_gate(tape, text, text_changes), text_attended))
    return states, _fed_forward(tape, f"{name}.ff_context", text, text_changes)


def _fed_forward(tape: Tape, name: str, states: Value, changes: Value) -> Value:
    hidden = _gated(tape, tape.linear(_modulate(tape, states, changes), f"{name}.linear_in"))
    return tape.add(states, tape.multiply(_gate(tape, states, changes), tape.linear(hidden, f"{name}.linear_out")))


def _single_block(tape: Tape, name: str, joint: Value, changes: Value, rotary: tuple[Value, Value]) -> Value:
    """Text and states together behind a block of one stream, whose projections are one layer."""
    made = tape.linear(_modulate(tape, joint, changes), f"{name}.attn.to_qkv_mlp_proj")
    batch, length, width = joint.shape
    size = tape.network.shapes[f"{name}.attn.norm_q.weight"][0]
    heads = tape.view(made, batch, length, width // size, size)
    query, key = (tape.rms_norm(heads, f"{name}.attn.norm_{part}") for part in "qk")
    attended = tape.attention(tape.turn_in_parts(query, *rotary), tape.turn_in_parts(key, *rotary), heads)
    hidden = _gated(tape, tape.view(made, batch, length, made.shape[-1] - 3 * width))
    both = tape.concatenate(tape.view(attended, *joint.shape), hidden, axis=2)
    return tape.add(joint, tape.multiply(_gate(tape, joint, changes), tape.linear(both, f"{name}.attn.to_out")))


def _gated(tape: Tape, states: Value) -> Value:
    """One half of the channels, activated, times the other (SwiGLU)."""
    half = tape.view(states, *states.shape[:-1], states.shape[-1] // 2)
    return tape.multiply(tape.activation(half), half)


def _projections(tape: Tape, name: str, layers: tuple[str, str], states: Value) -> list[Value]:
    """Queries, keys and values of one stream, `[B, L, heads, size]`, the first two normed."""
    layer, norm = layers
    size = tape.network.shapes[f"{name}.norm_q.weight"][0]
    found = []
    for part in ("q", "k", "v"):
        made = tape.linear(states, f"{name}.{layer.format(part)}")
        heads = tape.view(made, *made.shape[:2], made.shape[-1] // size, size)
        found.append(heads if part == "v" else tape.rms_norm(heads, f"{name}.{norm.format(part)}"))
    return found


def _modulate(tape: Tape, states: Value, changes: Value) -> Value:
    """Normed, scaled by one and a number for each channel, and shifted."""
    part = _gate(tape, states, changes)
    return tape.add(tape.multiply(tape.layer_norm(states), tape.copy(part)), part)


def _gate(tape: Tape, states: Value, changes: Value) -> Value:
    """A number for each channel, a part of the modulation."""
    return tape.view(changes, changes.shape[0], 1, states.shape[-1])


def encoding_numbers(latents: LatentFacts, image: MediaSize) -> int:
    """Five maps of 128 channels at the size of the image: what goes round a block, and its norm at work.

    Counted on diffusers' `AutoencoderKLFlux2`; a test counts again.
    """
    _, height, width = image
    return 5 * 128 * height * width


MEMORY = MemoryFacts(play, encoding_numbers)
