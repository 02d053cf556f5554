"""What a step keeps, measured on small modules and counted by hand."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from diffsynth_core.models.activation_memory import LiveBytes, MeasuredComponent, StepInputs, measure_step
from diffsynth_core.models.autocast import Autocast
from diffsynth_core.models.prepare import ComponentSetup
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import ComponentFacts

TOKENS, WIDTH, INNER = 10, 4, 8
BF16, F32 = torch.bfloat16, torch.float32


def kept_bytes(run, device="cuda", autocast=None, weights=()):
    """Bytes of the storages that autograd keeps of a run on the meta device, without those of the weights."""
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), Autocast(device, autocast):
        result = run()
    apart = {weight.untyped_storage()._cdata for weight in weights}
    return sum(tensor.untyped_storage().nbytes() for name, tensor in found.items() if name not in apart), result


def two_layers(trained=(), dtype=F32):
    """A layer, an activation and a layer over ten tokens of four numbers."""
    first, second = nn.Linear(WIDTH, INNER, device="meta"), nn.Linear(INNER, WIDTH, bias=False, device="meta")
    for layer, name in ((first, "first"), (second, "second")):
        layer.requires_grad_(name in trained).to(F32 if name in trained else dtype)
    states = torch.empty(1, TOKENS, WIDTH, device="meta", dtype=dtype)
    return (lambda: second(functional.gelu(first(states)))), [*first.parameters(), *second.parameters()]


@pytest.mark.parametrize(
    ("trained", "numbers"),
    [
        ((), 0),
        (("second",), TOKENS * INNER),
        (("first",), TOKENS * (WIDTH + INNER)),  # its input, and that of the activation behind it
        (("first", "second"), TOKENS * (WIDTH + INNER + INNER)),
    ],
)
def test_layers_keep_what_gradients_need(trained, numbers):
    run, weights = two_layers(trained)
    assert kept_bytes(run, weights=weights)[0] == 4 * numbers


def test_autocast_keeps_copies_of_weights_that_are_float32():
    run, weights = two_layers(("first", "second"), BF16)
    kept, _ = kept_bytes(run, autocast=BF16, weights=weights)
    # The weight of the first is needed for no gradient: its input takes none.
    assert kept == 2 * TOKENS * (WIDTH + INNER + INNER) + 2 * WIDTH * INNER


@pytest.mark.parametrize(("device", "dtype"), [("cpu", BF16), ("cuda", F32)])
def test_norms_are_float32_under_autocast_on_gpus_alone(device, dtype):
    states = torch.empty(1, TOKENS, WIDTH, device="meta", dtype=BF16, requires_grad=True)
    scale = torch.empty(WIDTH, device="meta", dtype=BF16)
    for norm in (functional.layer_norm, partial(functional.rms_norm, weight=scale)):
        _, result = kept_bytes(lambda norm=norm: norm(states, (WIDTH,)), device, BF16)
        assert result.dtype == dtype


def test_a_fused_norm_keeps_its_input_and_a_number_for_each_row():
    states = torch.empty(1, TOKENS, WIDTH, device="meta", dtype=BF16, requires_grad=True)
    run = partial(functional.rms_norm, states, (WIDTH,))
    assert kept_bytes(run)[0] == 2 * TOKENS * WIDTH + 4 * TOKENS
    assert kept_bytes(run, "cpu")[0] == 4 * TOKENS * WIDTH + 4 * TOKENS  # step by step, in float32


def test_attention_keeps_what_fused_kernels_do():
    heads = 2
    states = torch.empty(1, TOKENS, heads, WIDTH, device="meta", requires_grad=True)
    query, key, value = (states.transpose(1, 2) * factor for factor in (1, 2, 3))

    def attend():
        return functional.scaled_dot_product_attention(query, key, value)

    kept, result = kept_bytes(attend)
    assert kept == 4 * (4 * heads * TOKENS * WIDTH + heads * TOKENS)
    assert result.transpose(1, 2).is_contiguous()  # heads come together without a copy


class Block(nn.Module):
    """One of the blocks of a toy transformer, with a norm before its layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, states):
        return states + functional.gelu(self.layer(self.norm(states)))


class Toy(nn.Module):
    """A transformer that switches checkpointing on as those of diffusers and transformers do."""

    gradient_checkpointing = False

    def __init__(self, num_layers):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_layers))
        self.call = None

    def _set_gradient_checkpointing(self, enable, gradient_checkpointing_func):
        self.gradient_checkpointing, self.call = enable, gradient_checkpointing_func

    def forward(self, states):
        for block in self.blocks:
            states = self.call(block, states) if self.call else block(states)
        return states


class ToyFamily:
    """As much of a family as a measurement asks for."""

    facts = SimpleNamespace(
        denoiser="dit",
        text_column="prompt",
        tokenizers={},
        component=lambda name: ComponentFacts(name, name, (), (), blocks={"blocks": "num_layers"}),
    )

    def build(self, component, config):
        return Toy(**config)

    def checkpoint_gradients(self, component, module, function=None):
        module._set_gradient_checkpointing(True, None)

    def blank_encoding(self, variant, denoiser, sizes):
        return {"latents": torch.empty(TOKENS, WIDTH)}

    def collate(self, samples):
        return {"latents": torch.stack([sample["latents"] for sample in samples])}

    def predict_velocity(self, components, noisy, sigma, batch):
        return components["dit"](noisy)


def measure(built, blocks, batch=1, checkpointing="full"):
    names = {f"blocks.{number}.layer.{name}" for number in range(built) for name in ("weight", "bias")}
    component = MeasuredComponent(
        {"num_layers": built}, F32, ComponentSetup(frozenset(names), checkpointing=checkpointing), blocks=blocks
    )
    target = SimpleNamespace(column="image")
    inputs = StepInputs(
        SimpleNamespace(step_components=(), conditions=(), values=(), target=target),
        (),
        StepSizes(batch, ((1, 8, 8),), 0),
    )
    return measure_step(ToyFamily(), {"dit": component}, inputs, None, "cuda")


@pytest.mark.parametrize("checkpointing", ["full", "keep_every_2", "keep_every_3", "keep_every_4"])
@pytest.mark.parametrize("batch", [1, 2])
def test_three_blocks_tell_of_all(batch, checkpointing):
    assert measure(3, {"blocks": 7}, batch, checkpointing) == measure(7, {}, batch, checkpointing)


@pytest.mark.parametrize(("every", "kept"), [(2, 3), (3, 2), (4, 1)])
def test_of_every_nth_block_all_is_kept(every, kept):
    whole, some = measure(7, {}), measure(7, {}, checkpointing=f"keep_every_{every}")
    assert some.stored == whole.stored
    assert some.checkpointed == whole.checkpointed + kept * whole.largest_block


def test_recomputed_blocks_keep_their_inputs_and_one_is_there_at_a_time():
    measured, states = measure(3, {"blocks": 5}), 4 * TOKENS * WIDTH
    error = states
    assert measured.block_inputs == states
    assert measured.checkpointed == 5 * states + error
    assert measured.largest_block < (measured.stored - error) / 4


def test_the_fullest_moment_is_that_of_the_most_bytes_at_once():
    states = torch.empty(1000, device="meta")
    with LiveBytes([states]) as live:
        for _ in range(3):
            states = states + 1
    assert live.peak == 2 * states.nbytes
