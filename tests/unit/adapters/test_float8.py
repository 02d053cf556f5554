"""Linear layers with weights stored in 8-bit floats: their output, what they save for the backward pass, and which
they are.
"""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from diffsynth_core.adapters.float8 import Float8Format, fits
from diffsynth_core.adapters.lora import add_lora, lora_layers
from diffsynth_core.adapters.stored import StoredLinear, layers_in_blocks


def pair(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[StoredLinear, nn.Linear]:
    """A layer with 8-bit storage, and a plain one with the same rounded weight."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 16, bias=bias, dtype=dtype).requires_grad_(False)
    stored = StoredLinear(plain, Float8Format(), dtype, Float8Format().pack(plain.weight))
    plain.weight.copy_(plain.weight.to(torch.float8_e4m3fn).to(dtype))
    return stored, plain


def run(layer: nn.Module, value: torch.Tensor, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Return output, gradient of the input, and what was saved for the backward pass."""
    kept: list[torch.Tensor] = []
    value = value.clone().requires_grad_()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        output = layer(value)
    (output.float() ** 2).sum().backward()
    return output, value.grad, kept


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_output_and_gradient_are_those_of_the_rounded_weight(dtype, autocast, shape, bias):
    stored, plain = pair(dtype, bias)
    value = torch.randn(shape, dtype=dtype)
    ours, theirs = run(stored, value, autocast), run(plain, value, autocast)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert ours[0].dtype == theirs[0].dtype and ours[1].dtype == dtype


def test_the_backward_pass_fetches_the_bytes_again_and_keeps_nothing(monkeypatch):
    stored, _ = pair()
    fetched = []
    monkeypatch.setattr(stored, "fetch", lambda: fetched.append(1) or StoredLinear.fetch(stored))
    _, _, kept = run(stored, torch.randn(3, 24))
    assert kept == [] and len(fetched) == 2
    assert stored.stored.nbytes == 24 * 16


def test_a_frozen_input_costs_nothing():
    stored, _ = pair()
    output = stored(torch.randn(3, 24))
    assert not output.requires_grad


def test_it_answers_as_a_linear_layer_of_its_number_format():
    stored, plain = pair(torch.bfloat16)
    assert isinstance(stored, nn.Linear)
    assert torch.equal(stored.weight, plain.weight) and stored.weight.dtype == torch.bfloat16
    assert (stored.in_features, stored.out_features, stored.bias) == (24, 16, plain.bias)
    assert [parameter.dtype for parameter in stored.parameters() if parameter.is_floating_point()] == [torch.bfloat16]


def test_a_cast_of_the_model_leaves_the_bytes():
    stored, plain = pair()
    bytes_before = stored.stored.clone()
    stored.to(torch.float16).float()
    assert torch.equal(stored.stored, bytes_before)
    assert torch.equal(copy.deepcopy(stored).weight, plain.weight)


def test_a_weight_cannot_be_put_into_it():
    stored, _ = pair()
    with pytest.raises((KeyError, AttributeError)):
        stored.weight = nn.Parameter(torch.zeros(16, 24))


def test_a_lora_on_it_trains_in_float32():
    stored, plain = pair(torch.bfloat16)
    value = torch.randn(3, 24, dtype=torch.bfloat16)
    gradients = []
    for layer in (stored, plain):
        model = nn.ModuleDict({"q": layer})
        add_lora(model, ["q"], 4, seed=0)
        nn.init.constant_(lora_layers(model)["q"].lora_B["default"].weight, 0.1)
        run(model["q"], value, autocast=True)
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    ours, theirs = gradients
    assert len(ours) == 2 and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in ours.values())


def network() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(4, 4)
    model.before = nn.Sequential(nn.Linear(4, 4))
    block = nn.ModuleDict({"q": nn.Linear(4, 4), "mod": nn.Sequential(nn.SiLU(), nn.Linear(4, 8))})
    block["norm"], block["conv"] = nn.LayerNorm(4), nn.Conv2d(4, 4, 1)
    block["bilinear"], block["tied"] = nn.Bilinear(4, 4, 4), nn.Linear(4, 4)
    block["own"] = type("OwnLinear", (nn.Linear,), {})(4, 4)
    model.blocks = nn.ModuleList([block])
    model.blocks_behind = nn.Linear(4, 4)
    block["tied"].weight = model.embed.weight
    return model


def test_linear_layers_in_blocks_are_stored_so():
    assert layers_in_blocks(network()) == {"blocks.0.q", "blocks.0.mod.1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_what_becomes_no_number_does_not_fit(dtype):
    def weight(value: float) -> torch.Tensor:
        return torch.tensor([[0.0, value]]).to(dtype)

    assert fits(weight(448.0)) and fits(weight(-448.0))
    for value in (512.0, -512.0, float("inf"), float("-inf"), float("nan")):
        assert not fits(weight(value))


def test_8_bit_floats_of_the_format_fit():
    assert fits(torch.tensor([[448.0, -448.0]]).to(torch.float8_e4m3fn))
