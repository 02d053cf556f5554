"""The forward pass of FLUX.1's transformer as far as it keeps memory. No torch.

Source: `FluxTransformer2DModel` of diffusers.
"""

from diffsynth_core.models.flux.captions import T5_TOKENS
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
    states = tape.linear(tape.given(batch, tokens, shapes["x_embedder.weight"][1], dtype=dtype), "x_embedder")
    time = _condition(tape, batch)
    text = tape.given(batch, T5_TOKENS, shapes["context_embedder.weight"][1], dtype=dtype)
    text = tape.linear(text, "context_embedder")
    rotary = tape.given(T5_TOKENS + tokens, size), tape.given(T5_TOKENS + tokens, size)
    for number in range(count_blocks(shapes, "transformer_blocks.")):
        with tape.block(states, text, time):
            states, text = _block(tape, f"transformer_blocks.{number}", states, text, time, rotary)
    joint = None
    for number in range(count_blocks(shapes, "single_transformer_blocks.")):
        with tape.block(states, text, time):
            joint = _single_block(tape, f"single_transformer_blocks.{number}", states, text, time, rotary)
        states, text = tape.view(joint, *states.shape), tape.view(joint, *text.shape)
    states = modulate_last(tape, states, time)
    prediction = tape.linear(states, "proj_out")
    tape.error(prediction, batch * sizes.tokens(TOKEN_SIDE)[0] * prediction.shape[-1])


def _condition(tape: Tape, batch: int) -> Value:
    """Timestep, guidance and pooled text as one vector."""
    shapes, dtype = tape.network.shapes, tape.network.dtype
    parts = []
    for name in ("timestep_embedder", "guidance_embedder", "text_embedder"):
        module = f"time_text_embed.{name}"
        given = tape.given(batch, shapes[f"{module}.linear_1.weight"][1], dtype=dtype)
        parts.append(tape.linear(tape.activation(tape.linear(given, f"{module}.linear_1")), f"{module}.linear_2"))
    return tape.add(tape.add(parts[0], parts[1]), parts[2])


def _block(
    tape: Tape, name: str, states: Value, text: Value, time: Value, rotary: tuple[Value, Value]
) -> tuple[Value, Value]:
    """(states, text) behind a block of two streams."""
    changes = tape.linear(tape.activation(time), f"{name}.norm1.linear")
    changed = modulate(tape, states, changes)
    text_changes = tape.linear(tape.activation(time), f"{name}.norm1_context.linear")
    text_changed = modulate(tape, text, text_changes)
    image = projections(tape, f"{name}.attn", ("to_{}", "norm_{}"), changed)
    caption = projections(tape, f"{name}.attn", ("add_{}_proj", "norm_added_{}"), text_changed)
    query, key, value = (tape.concatenate(*both, axis=1) for both in zip(caption, image, strict=True))
    joint = tape.attention(tape.turn_in_parts(query, *rotary), tape.turn_in_parts(key, *rotary), value)
    attended = tape.linear(tape.cut(joint, *states.shape), f"{name}.attn.to_out.0")
    text_attended = tape.linear(tape.cut(joint, *text.shape), f"{name}.attn.to_add_out")
    states = tape.add(states, tape.multiply(gate(tape, changes), attended))
    states = _fed_forward(tape, f"{name}.ff", states, changes)
    text = tape.add(text, tape.multiply(gate(tape, text_changes), text_attended))
    return states, _fed_forward(tape, f"{name}.ff_context", text, text_changes)


def _fed_forward(tape: Tape, name: str, states: Value, changes: Value) -> Value:
    hidden = tape.activation(tape.linear(modulate(tape, states, changes), f"{name}.net.0.proj"))
    return tape.add(states, tape.multiply(gate(tape, changes), tape.linear(hidden, f"{name}.net.2")))


def _single_block(tape: Tape, name: str, states: Value, text: Value, time: Value, rotary: tuple[Value, Value]) -> Value:
    """Text and states together behind a block of one stream."""
    joint = tape.concatenate(text, states, axis=1)
    changes = tape.linear(tape.activation(time), f"{name}.norm.linear")
    changed = modulate(tape, joint, changes)
    hidden = tape.activation(tape.linear(changed, f"{name}.proj_mlp"))
    query, key, value = projections(tape, f"{name}.attn", ("to_{}", "norm_{}"), changed)
    attended = tape.attention(tape.turn_in_parts(query, *rotary), tape.turn_in_parts(key, *rotary), value)
    both = tape.concatenate(tape.view(attended, *joint.shape), hidden, axis=2)
    return tape.add(joint, tape.multiply(gate(tape, changes), tape.linear(both, f"{name}.proj_out")))


def projections(tape: Tape, name: str, layers: tuple[str, str], states: Value) -> list[Value]:
    """Queries, keys and values of one stream, `[B, L, heads, size]`, the first two normed."""
    layer, norm = layers
    found = []
    for part in ("q", "k", "v"):
        made = tape.linear(states, f"{name}.{layer.format(part)}")
        size = tape.network.shapes[f"{name}.{norm.format('q')}.weight"][0]
        heads = tape.view(made, *made.shape[:2], made.shape[-1] // size, size)
        found.append(heads if part == "v" else tape.rms_norm(heads, f"{name}.{norm.format(part)}"))
    return found


def modulate(tape: Tape, states: Value, changes: Value) -> Value:
    """Normed, scaled by one and a number for each channel, and shifted."""
    part = gate(tape, changes, states.shape[-1])
    return tape.add(tape.multiply(tape.layer_norm(states), tape.copy(part)), part)


def gate(tape: Tape, changes: Value, width: int | None = None) -> Value:
    """A number for each channel, a part of the modulation."""
    return tape.view(changes, changes.shape[0], 1, width or tape.network.shapes["proj_out.weight"][1])


def modulate_last(tape: Tape, states: Value, time: Value) -> Value:
    """The norm before the last layer (`AdaLayerNormContinuous`)."""
    changes = tape.linear(tape.cast(tape.activation(time), states.dtype), "norm_out.linear")
    return modulate(tape, states, changes)


def encoding_numbers(latents: LatentFacts, image: MediaSize) -> int:
    """Five maps of 128 channels at the size of the image: what goes round a block, and its norm at work.

    Counted on diffusers' `AutoencoderKL`; a test counts again.
    """
    _, height, width = image
    return 5 * 128 * height * width


MEMORY = MemoryFacts(play, encoding_numbers)
