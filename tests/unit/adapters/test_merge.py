"""W + (alpha / rank) B A by hand and against peft: float32, rounded once, and the rounding error."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from diffsynth_core.adapters.deltas import WeightDelta, open_deltas, read_delta
from diffsynth_core.adapters.lora import add_lora, lora_weights
from diffsynth_core.adapters.merge import RelativeError, Workspace, merge_rows
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.key_maps import SAME_NAMES, TableMap
from diffsynth_core.weights.lora_files import read_lora_file
from diffsynth_core.weights.lora_formats import DIT, LoraNaming


def only(shape: tuple[int, ...], place: tuple[int, ...], value: float) -> torch.Tensor:
    """Return zeros except for one element."""
    tensor = torch.zeros(shape)
    tensor[place] = value
    return tensor


def merge(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, RelativeError]:
    """Merge a weight at once, and return the rounding error too."""
    factors = WeightDelta(down.float().flatten(1), up.float().flatten(1))
    merged, lost = merge_rows(weight.flatten(1), factors, dtype, Workspace())
    return merged.view(weight.shape), RelativeError(lost, factors.squared_norm)


def test_one_element_of_each_half_goes_where_the_formula_says():
    merged, _ = merge(torch.zeros(3, 4), only((2, 4), (1, 3), 2.0), only((3, 2), (0, 1), 5.0))
    assert torch.equal(merged, only((3, 4), (0, 3), 10.0))
    merged, _ = merge(torch.zeros(3, 4), only((2, 4), (1, 3), 2.0), only((3, 2), (0, 0), 5.0))
    assert torch.equal(merged, torch.zeros(3, 4))


def test_one_element_of_a_convolution():
    merged, _ = merge(
        torch.zeros(5, 4, 3, 3), only((2, 4, 3, 3), (1, 3, 0, 2), 2.0), only((5, 2, 1, 1), (4, 1, 0, 0), 5.0)
    )
    assert torch.equal(merged, only((5, 4, 3, 3), (4, 3, 0, 2), 10.0))


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 8), nn.Conv2d(3, 8, 3), nn.Conv3d(3, 4, (1, 2, 2))], ids=["linear", "2d", "3d"]
)
def test_as_peft_merges(layer):
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = nn.Module()
    module.layer = layer
    before = layer.weight.detach().clone()
    add_lora(module, ["layer"], 3, 0)
    halves = lora_weights(module)["layer"]
    with torch.no_grad():
        halves.B.normal_()
    down, up = halves.A.detach(), halves.B.detach()
    assert isinstance(module.layer, BaseTunerLayer)
    module.layer.merge()
    merged, _ = merge(before, down, up)
    assert_close(merged, module.layer.base_layer.weight.detach(), rtol=1e-6, atol=1e-6)


STEP = 2.0**-7
"""Distance of bfloat16 numbers at 1."""


@pytest.mark.parametrize(
    ("weight", "change", "steps"),
    [(0.5, 1.25, 2), (0.0, 0.5 + 2**-12, 1)],
    ids=["the weight rounded before would make it 1", "the change rounded before would make it 0"],
)
def test_it_is_rounded_once(weight, change, steps):
    """In steps above 1, to the nearest, ties to even."""
    one = torch.ones(1, 1)
    merged, _ = merge(torch.tensor([[1 + weight * STEP]]), one, one * change * STEP, torch.bfloat16)
    assert merged.dtype == torch.bfloat16 and merged.item() == 1 + steps * STEP


def test_halves_of_a_bfloat16_file_are_multiplied_in_float32():
    half = torch.tensor([[1 + STEP]]).bfloat16()
    assert merge(torch.zeros(1, 1), half, half)[0].item() == (1 + STEP) ** 2


def test_what_rounding_loses_by_hand():
    """Two weights at 1, steps of 1/128: a change of (3/4, 1) steps becomes 1 step each, the first a quarter too
    large.
    """
    change = torch.tensor([[0.75 * STEP], [STEP]])
    _, loss = merge(torch.ones(2, 1).bfloat16(), torch.ones(1, 1), change, torch.bfloat16)
    assert loss.value == pytest.approx(0.25 / (0.75**2 + 1) ** 0.5)
    loss.add(RelativeError(0.0, 0.75**2 * STEP**2))
    assert loss.value == pytest.approx(0.25 / (2 * 0.75**2 + 1) ** 0.5)


def test_what_a_narrower_format_loses_of_the_weight_itself_is_not_the_changes_loss():
    """A weight of 1 + 3/8 steps would be 1 without a LoRA; a change of one step gives 1 + 11/8, rounded to 1 step."""
    _, loss = merge(torch.tensor([[1 + 0.375 * STEP]]), torch.ones(1, 1), torch.tensor([[STEP]]), torch.bfloat16)
    assert loss.value == 0


def test_the_norm_of_a_change_without_the_change():
    generator = torch.Generator().manual_seed(0)
    factors = WeightDelta(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator))
    assert factors.squared_norm == pytest.approx(float((factors.B @ factors.A).norm()) ** 2, rel=1e-5)


def test_nothing_asked_for_loses_nothing():
    assert RelativeError().value == 0


@pytest.mark.parametrize(("spread", "dtype", "share"), [(1e-4, torch.bfloat16, 0.32), (1e-4, torch.float32, 0.0)])
def test_the_share_lost_by_a_usual_lora(spread, dtype, share):
    """A change with a standard deviation of 1e-4 of weights with 0.02."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, 512, generator=generator) * 0.02).to(dtype)
    down, up = torch.randn(64, 512, generator=generator), torch.randn(512, 64, generator=generator) * spread / 8
    _, loss = merge(weight, down, up, dtype)
    assert loss.value == pytest.approx(share, abs=0.01)


FUSED = TableMap({"blocks.{}.out": "blocks.{}.to_out"}, fused={"blocks.{}.qkv": ("blocks.{}.q", "blocks.{}.k")})
SHAPES = {"blocks.0.qkv": (4, 3), "blocks.0.out": (2, 4)}


def tensors_of(shapes):
    """Return weight shapes of modules, by weight name."""
    return {f"{module}.weight": shape for module, shape in shapes.items()}


def changes(tmp_path, tensors: dict[str, torch.Tensor], public_keys=FUSED, naming: LoraNaming = DIT):
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora_file(tmp_path / "lora.safetensors", SHAPES, naming)
    names = [
        "blocks.0.k.weight",
        "blocks.0.q.weight",
        "blocks.0.to_out.weight",
        "blocks.0.q.bias",
        "norm.weight",
        "table",
    ]
    with open_deltas(file, tensors_of(SHAPES), public_keys) as opened:
        return {name: factors.B @ factors.A for name in names if (factors := opened.of(name)) is not None}


def test_a_lora_of_a_fused_module_reaches_its_parts(tmp_path):
    down, up = torch.randn(2, 3), torch.randn(4, 2)
    found = changes(tmp_path, {"blocks.0.qkv.lora_A.default.weight": down, "blocks.0.qkv.lora_B.default.weight": up})
    assert found.keys() == {"blocks.0.q.weight", "blocks.0.k.weight"}
    assert_close(found["blocks.0.q.weight"], up[:2] @ down)
    assert_close(found["blocks.0.k.weight"], up[2:] @ down)


@pytest.mark.parametrize("both", [True, False])
def test_parts_may_have_loras_of_their_own(tmp_path, both):
    """With different ranks and scales; a part without one is unchanged."""
    naming = LoraNaming("dit", {"kohya": FUSED})
    q, k = (torch.randn(2, 3), torch.randn(2, 2)), (torch.randn(1, 3), torch.randn(2, 1))
    tensors = {
        "lora_unet_blocks_0_k.lora_down.weight": k[0],
        "lora_unet_blocks_0_k.lora_up.weight": k[1],
        "lora_unet_blocks_0_k.alpha": torch.tensor(0.5),
    }
    if both:
        tensors |= {"lora_unet_blocks_0_q.lora_down.weight": q[0], "lora_unet_blocks_0_q.lora_up.weight": q[1]}
    found = changes(tmp_path, tensors, naming=naming)
    assert_close(found["blocks.0.k.weight"], 0.5 * k[1] @ k[0])
    assert_close(found["blocks.0.q.weight"], q[1] @ q[0] if both else torch.zeros(2, 3))


@pytest.mark.parametrize(("ends", "rows"), [(".default.weight", [2, 3, 0, 1]), (".weight", [0, 1, 2, 3])])
def test_rows_in_another_order_find_theirs(tmp_path, ends, rows):
    """FLUX.1's last modulation: documented files have the shift first, the module and diffusers' files the scale."""
    swapped = TableMap({}, swap_halves={"last": "norm_out"})
    name = "last" if ends == ".default.weight" else "transformer.norm_out"
    down, up = torch.randn(1, 3), torch.randn(4, 1)
    save_file({f"{name}.lora_A{ends}": down, f"{name}.lora_B{ends}": up}, tmp_path / "lora.safetensors")
    shapes = {"last": (4, 3)}
    file = read_lora_file(tmp_path / "lora.safetensors", shapes, LoraNaming("dit", {"diffusers": swapped}))
    with open_deltas(file, tensors_of(shapes), swapped) as opened:
        change = opened.of("norm_out.weight")
        assert torch.equal(change.B @ change.A, (up @ down)[rows])


def test_a_convolution_of_one_pixel_reaches_the_linear_layer_it_is_here(tmp_path):
    down, up = torch.randn(2, 3, 1, 1), torch.randn(4, 2, 1, 1)
    save_file({"a.lora_A.default.weight": down, "a.lora_B.default.weight": up}, tmp_path / "lora.safetensors")
    shapes = {"a": (4, 3, 1, 1)}
    file = read_lora_file(tmp_path / "lora.safetensors", shapes)
    with open_deltas(file, tensors_of(shapes), TableMap({}, pointwise={"a": "b"})) as opened:
        change = opened.of("b.weight")
        assert_close(change.B @ change.A, up.flatten(1) @ down.flatten(1))


def test_another_component_of_the_same_names_needs_its_own_key(tmp_path):
    halves = {"pipe.vae.blocks.0.out.lora_A.default.weight": torch.ones(1, 4)}
    halves |= {"pipe.vae.blocks.0.out.lora_B.default.weight": torch.ones(2, 1)}
    with pytest.raises(DiffSynthError, match="2 of 2 keys match no module"):
        changes(tmp_path, halves, SAME_NAMES)
    assert changes(tmp_path, halves, naming=LoraNaming("vae")).keys() == {"blocks.0.to_out.weight"}


@pytest.mark.parametrize(("shared", "rank"), [(True, 2), (False, 4)])
def test_parts_with_one_a_keep_its_rank(tmp_path, shared, rank):
    """Otherwise the ranks of parts add up."""
    naming = LoraNaming("dit", {"kohya": FUSED})
    downs = [torch.randn(2, 3)] * 2 if shared else [torch.randn(2, 3) for _ in range(2)]
    ups = [torch.randn(2, 2) for _ in range(2)]
    tensors = {}
    for part, down, up in zip("qk", downs, ups, strict=True):
        tensors[f"lora_unet_blocks_0_{part}.lora_down.weight"] = down.clone()
        tensors[f"lora_unet_blocks_0_{part}.lora_up.weight"] = up
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora_file(tmp_path / "lora.safetensors", SHAPES, naming)
    with safe_open(file.path, framework="pt") as stream:
        factors = read_delta(file, stream, "blocks.0.qkv.weight", SHAPES["blocks.0.qkv"])
    assert factors.rank == rank
    assert_close(factors.B @ factors.A, torch.cat([up @ down for up, down in zip(ups, downs, strict=True)]))
