"""The formats of stored weights: what a layer computes with them, what they round away, and the bytes they take."""

import math
from collections.abc import Iterable

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffsynth_core.adapters.formats import FORMATS
from diffsynth_core.adapters.lora import add_lora, lora_layers
from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.hub.model_folder import shipped_folder
from diffsynth_core.models.weight_store import STORES, find_store

QUANTIZED = ["fp8", "int8", "nf4"]
ROWS, COLUMNS = 96, 320
SMALL = 0.02
"""Standard deviation of the weights of a transformer of these widths."""


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * SMALL


def stored(weight: torch.Tensor, name: str, dtype: torch.dtype = torch.float32) -> StoredLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype).requires_grad_(False)
    tensors = FORMATS[name].pack(weight)
    assert tensors is not None
    return StoredLinear(layer, FORMATS[name], dtype, tensors)


def error_of(weight: torch.Tensor, name: str) -> float:
    """Return the rounding error of a weight, relative to it (root mean square)."""
    return float((stored(weight, name).weight - weight).norm() / weight.norm())


def error_of_all(weights: Iterable[torch.Tensor], name: str) -> float:
    """Return that of several weights together."""
    squares = [((stored(weight, name).weight - weight).square().sum(), weight.square().sum()) for weight in weights]
    return float((sum(error for error, _ in squares) / sum(size for _, size in squares)) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_output_and_gradients_are_those_of_the_dequantized_weight(weight, name, dtype):
    """Also of a LoRA in float32 beside it, under autocast."""
    ours = stored(weight, name, dtype)
    plain = nn.Linear(COLUMNS, ROWS, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(ours.weight)
    plain.bias.copy_(ours.bias)
    results = []
    for layer in (ours, plain):
        model = nn.ModuleDict({"q": layer})
        add_lora(model, ["q"], 4, seed=0)
        nn.init.constant_(lora_layers(model)["q"].lora_B["default"].weight, 0.1)
        x = torch.randn(5, COLUMNS, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = model["q"](x * 1)  # autocast adds up gradients of leaves otherwise
        output.float().square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in results[0])


def test_what_the_formats_round_away(weight, capsys):
    """Relative error, by the standard deviation of the weights. A cast to e4m3 has few numbers for small ones; with a
    scale its three bits of mantissa remain: an error of at most 1/16, 2.6 % in the root mean square.
    """
    deviations = (0.02, 0.01, 0.005, 0.002)
    table = {
        name: [error_of(weight * (deviation / SMALL), name) for deviation in deviations]
        for name in ("float8", *QUANTIZED)
    }
    with capsys.disabled():
        print("\nrelative rounding error by standard deviation" + "".join(f"{each:8}" for each in deviations))
        for name, errors in table.items():
            print(f"  {name:43}" + "".join(f"{error:8.2%}" for error in errors))
    tiny = load_file(shipped_folder("diffsynth/shapes") / "transformer/diffusion_pytorch_model.safetensors")
    layers = {key: tensor.float() for key, tensor in tiny.items() if "blocks" in key and tensor.ndim == 2}
    of_tiny = {name: error_of_all(layers.values(), name) for name in table}
    with capsys.disabled():
        print("of the tiny model: " + ", ".join(f"{name} {error:.2%}" for name, error in of_tiny.items()))
    assert 0.005 < of_tiny["int8"] < 0.01 < of_tiny["fp8"] < of_tiny["float8"] < 0.03 < of_tiny["nf4"] < 0.1
    cast, scaled = table["float8"], table["fp8"]
    assert 0.03 < cast[0] < cast[1] < cast[2] < 0.13 and cast[3] > 0.2
    assert all(0.025 < error < 0.027 for error in scaled)
    assert scaled[0] < cast[0] and all(error < of_cast / 2 for error, of_cast in zip(scaled[1:], cast[1:], strict=True))
    assert all(0.001 < error < 0.01 for error in table["int8"])
    assert all(0.05 < error < 0.1 for error in table["nf4"])


@pytest.mark.parametrize("name", ["float8", *QUANTIZED])
def test_the_bytes_are_those_of_the_plan(weight, name):
    layer = stored(weight, name)
    taken = sum(tensor.nbytes for tensor in layer.fetch().values())
    assert taken == pytest.approx(STORES[name].nbytes(weight.shape), rel=0.005)
    there = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    assert {tensor.data_ptr() for tensor in layer.fetch().values()} <= there
    empty = StoredLinear(nn.Linear(COLUMNS, ROWS, device="meta"), FORMATS[name], torch.float32)
    assert {key: (t.shape, t.dtype) for key, t in empty.fetch().items()} == {
        key: (t.shape, t.dtype) for key, t in layer.fetch().items()
    }


def test_4_bits_take_about_a_quarter_of_bfloat16():
    assert STORES["nf4"].nbytes((3072, 3072)) / 3072**2 == pytest.approx(0.516, abs=0.001)


@pytest.mark.parametrize("name", ["float8", *QUANTIZED])
def test_a_layer_without_values_computes_shapes(name):
    layer = StoredLinear(nn.Linear(8, 6, device="meta").requires_grad_(False), FORMATS[name], torch.bfloat16)
    x = torch.empty(2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (2, 6) and x.grad.shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_of_any_floating_dtype_are_packed(weight, name, dtype):
    """Those that are in 8-bit floats already are not rounded again to such."""
    narrow = weight.to(dtype)
    if (name, dtype) == ("fp8", torch.float8_e4m3fn):
        assert torch.equal(stored(narrow, name).weight, narrow.float())
        return
    assert torch.equal(stored(narrow, name).weight, stored(narrow.float(), name).weight)


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_of_zeros_stay_zeros_and_huge_and_tiny_ones_keep_their_size(name):
    weight = torch.tensor([[0.0, 0.0], [1e30, -5e29], [1e-30, 1e-30]]).repeat_interleave(64, 1)
    wide = stored(weight, name).weight
    assert torch.equal(wide[0], torch.zeros(128))
    if name != "nf4":  # whose scales have a mean in common
        assert torch.allclose(wide, weight, rtol=0.05)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_with_what_is_no_number_is_not_packed(name, value):
    weight = torch.zeros(4, 64)
    weight[2, 3] = value
    assert FORMATS[name].pack(weight) is None


def test_a_weight_with_an_odd_number_of_columns_is_not_packed_in_4_bits():
    assert FORMATS["nf4"].pack(torch.randn(4, 7)) is None


@pytest.mark.parametrize("name", ["float8", "fp8"])
def test_a_weight_that_files_store_with_a_scale_per_row_is_not_rounded_again(weight, name):
    scale = torch.rand(ROWS, 1) + 0.5
    values = (weight * 1000).clamp(-120, 120).to(torch.float8_e4m3fn)
    assert FORMATS[name].keeps_scale(torch.float8_e4m3fn)
    layer = StoredLinear(nn.Linear(COLUMNS, ROWS), FORMATS[name], torch.float32, FORMATS[name].pack(values, scale))
    assert torch.equal(layer.weight, values.float() * scale)


def test_modules_are_left_out_by_name_or_the_end_of_it():
    store = find_store("nf4/img_mod.1,norm_out.linear")
    assert [store.takes(name) for name in ("b.0.img_mod.1", "b.0.img_mod.10", "b.0.img_mod", "norm_out.linear")] == [
        False, True, True, False,
    ]  # fmt: skip
    assert STORES["nf4"].takes("b.0.img_mod.1") and store.bytes_per_weight == STORES["nf4"].bytes_per_weight
