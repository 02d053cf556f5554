"""LoRA layers: the formula by hand, an initialization by seed and name, and files of every format."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from diffsynth_core.adapters.lora import add_lora, load_lora, lora_layers, lora_weights, name_lora
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.lora_formats import LORA_FORMATS

SHAPES = {"first": (3, 4), "blocks.0.q": (2, 3), "norm": (3,)}
RANK = 2


def model(dtype=torch.float32) -> nn.Module:
    """4 -> first -> 3 -> norm -> blocks.0.q -> 2, frozen, all weights zero except for the scale of the norm."""
    module = nn.Module()
    module.first = nn.Linear(4, 3)
    module.norm = nn.LayerNorm(3)
    module.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 2), "k": nn.Linear(3, 2)})])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(float(name == "norm.weight"))
    return module.to(dtype).requires_grad_(False)


def loraed(*modules: str, rank: int = RANK, seed: int = 0, dtype=torch.float32) -> nn.Module:
    module = model(dtype)
    add_lora(module, modules or ("first", "blocks.0.q"), rank, seed)
    return module


def starts(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: halves.A.detach().clone() for name, halves in lora_weights(module).items()}


def test_one_element_of_each_matrix_goes_where_the_formula_says():
    module = loraed()
    halves = lora_weights(module)["first"]
    with torch.no_grad():
        module.first.base_layer.weight[2, 1] = 10.0
        halves.A.zero_()
        halves.A[1, 3] = 2.0  # reads input 3 into rank 1
        halves.B[0, 1] = 5.0  # writes rank 1 to output 0
    output = module.first(torch.tensor([[1.0, 1.0, 1.0, 7.0]]))
    assert output.tolist() == [[2 * 5 * 7, 0, 10]]  # the scale alpha / rank is 1


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_the_scale_is_one_at_every_rank(rank):
    module = loraed("first", rank=rank)
    halves = lora_weights(module)["first"]
    with torch.no_grad():
        halves.A.fill_(1.0)
        halves.B.fill_(1.0)
    assert module.first(torch.ones(1, 4)).tolist() == [[4.0 * rank] * 3]


def test_a_convolution_follows_the_formula_too():
    module = nn.Module()
    module.conv = nn.Conv2d(1, 1, 2, bias=False).requires_grad_(False)
    nn.init.zeros_(module.conv.weight)
    add_lora(module, ["conv"], 1, 0)
    halves = lora_weights(module)["conv"]
    assert (halves.A.shape, halves.B.shape) == ((1, 1, 2, 2), (1, 1, 1, 1))
    assert halves.A.abs().max() <= 0.5 and halves.B.item() == 0
    with torch.no_grad():
        halves.A.zero_()
        halves.A[0, 0, 1, 0] = 3.0
        halves.B.fill_(2.0)
    assert module.conv(torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])).tolist() == [[[[600.0]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_lora_is_float32_changes_nothing_and_alone_takes_gradients(dtype):
    module = loraed(dtype=dtype)
    assert set(lora_layers(module)) == {"first", "blocks.0.q"}
    for name, halves in lora_weights(module).items():
        assert (tuple(halves.A.shape), tuple(halves.B.shape)) == ((2, SHAPES[name][1]), (SHAPES[name][0], 2))
        assert halves.A.dtype == halves.B.dtype == torch.float32
        assert halves.B.count_nonzero() == 0
        assert 0 < halves.A.abs().max() <= SHAPES[name][1] ** -0.5
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"{name}.lora_{half}.default.weight" for name in ("first", "blocks.0.q") for half in "AB"
    }  # fmt: skip
    x = torch.randn(2, 4, dtype=dtype)
    assert torch.equal(module.first(x), model(dtype).first(x))


def test_what_trained_in_full_before_still_does():
    module = model()
    module.first.requires_grad_(True)
    module.norm.requires_grad_(True)
    add_lora(module, ["first"], RANK, 0)
    trained = {
        name.replace(".base_layer", "") for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    assert trained == {
        "first.weight", "first.bias", "norm.weight", "norm.bias",
        "first.lora_A.default.weight", "first.lora_B.default.weight",
    }  # fmt: skip


def test_the_start_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    both = starts(loraed("first", "blocks.0.q", seed=7))
    torch.manual_seed(2)
    alone = starts(loraed("blocks.0.q", seed=7))
    assert torch.equal(both["blocks.0.q"], alone["blocks.0.q"])
    assert not torch.equal(both["blocks.0.q"], starts(loraed("blocks.0.q", seed=8))["blocks.0.q"])
    siblings = starts(loraed("blocks.0.q", "blocks.0.k"))
    assert not torch.equal(siblings["blocks.0.q"], siblings["blocks.0.k"])


def test_the_start_leaves_the_global_generator_to_others():
    torch.manual_seed(0)
    expected = starts(loraed())
    torch.rand(5)
    assert all(torch.equal(expected[name], start) for name, start in starts(loraed()).items())


def test_the_start_is_uniform_up_to_its_bound():
    module = nn.Module()
    module.wide = nn.Linear(400, 8).requires_grad_(False)
    add_lora(module, ["wide"], 64, 0)
    start = starts(module)["wide"] * 20
    assert start.abs().max() <= 1.0
    assert abs(start.mean()) < 0.02 and abs(start.std() - 3**-0.5) < 0.01


def test_a_module_of_a_name_that_ends_alike_is_left_alone():
    module = nn.Module()
    module.q = nn.Linear(2, 2)
    module.inner = nn.ModuleDict({"q": nn.Linear(2, 2)})
    add_lora(module, ["q"], 1, 0)
    assert set(lora_layers(module)) == {"q"}


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["gone"], "cannot add a LoRA to these modules"),
        (["first", "blocks.9.q"], "1 of 2 LoRA target modules do not exist: `blocks.9.q`"),
        (["norm"], "cannot add a LoRA to these modules"),
    ],
)
def test_modules_that_cannot_carry_a_lora_are_refused(modules, expected):
    with pytest.raises(DiffSynthError) as caught:
        add_lora(model(), modules, RANK, 0)
    assert expected in str(caught.value)
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("lora_format", LORA_FORMATS)
def test_named_weights_are_the_weights_and_load_into_the_same_model(tmp_path, lora_format):
    module = loraed()
    with torch.no_grad():
        for halves in lora_weights(module).values():
            halves.B.normal_()
    named = name_lora(lora_weights(module), lora_format)
    assert len(named) == (6 if lora_format == "kohya" else 4)
    assert all(tensor.item() == RANK for name, tensor in named.items() if name.endswith(".alpha"))
    save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, tmp_path / "lora.safetensors")
    other = loraed(seed=5)
    assert load_lora(other, tmp_path / "lora.safetensors") == 2
    for name, halves in lora_weights(other).items():
        assert torch.equal(halves.A, lora_weights(module)[name].A)
        assert torch.equal(halves.B, lora_weights(module)[name].B)


@pytest.mark.parametrize("stem", ["lora_unet_blocks_0_q", "diffusion_model.blocks.0.q"])
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_a_stored_alpha_scales_the_product(tmp_path, alpha, stem):
    down, up = torch.randn(RANK, 3), torch.randn(2, RANK)
    ends = ("lora_down", "lora_up") if stem.startswith("lora_unet") else ("lora_A", "lora_B")
    tensors = {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "lora.safetensors")
    module = loraed("blocks.0.q")
    assert load_lora(module, tmp_path / "lora.safetensors") == 1
    x = torch.randn(5, 3)
    assert_close(module.blocks[0]["q"](x), x @ (alpha / RANK * up @ down).T)


def test_a_bfloat16_file_is_read_in_full_precision_of_its_values(tmp_path):
    down, up = torch.randn(RANK, 3).bfloat16(), torch.randn(2, RANK).bfloat16()
    tensors = {"blocks.0.q.lora_A.default.weight": down, "blocks.0.q.lora_B.default.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    module = loraed("blocks.0.q")
    load_lora(module, tmp_path / "lora.safetensors")
    halves = lora_weights(module)["blocks.0.q"]
    assert torch.equal(halves.A, down.float()) and torch.equal(halves.B, up.float())
    assert halves.B.dtype == torch.float32 and halves.B.requires_grad
