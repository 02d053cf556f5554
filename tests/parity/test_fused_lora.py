"""A LoRA on modules that the original stores as one matrix: output, gradients and files equal those on that matrix.

The model is diffusers' transformer of FLUX.1, whose q, k, v (and the MLP of single blocks) are one matrix in
black-forest-labs' files. The reference is the weights with `B A` added.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from diffsynth_core.adapters.lora import add_lora, load_lora, lora_weights, name_lora
from diffsynth_core.checkpoints.saved_states import LoopState
from diffsynth_core.checkpoints.state import restore_state, save_state, state_of
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.key_maps import ComposedKeyMap, TableMap
from diffsynth_core.weights.lora_formats import LoraNaming
from diffsynth_core.weights.lora_keys import match_lora_keys

ORIGINAL = TableMap(
    {"double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj"},
    fused={
        "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
        "single_blocks.{}.linear1": (
            *((f"single_transformer_blocks.{{}}.attn.to_{part}", 1) for part in "qkv"),
            ("single_transformer_blocks.{}.proj_mlp", 4),
        ),
    },
    swap_halves={"final_layer.adaLN_modulation.1": "norm_out.linear"},
)
TYPED = TableMap(
    {
        "blocks.{}.ff_a.0": "double_blocks.{}.img_mlp.0",
        "blocks.{}.attn.a_to_qkv": "double_blocks.{}.img_attn.qkv",
        "blocks.{}.attn.b_to_qkv": "double_blocks.{}.txt_attn.qkv",
        "single_blocks.{}.to_qkv_mlp": "single_blocks.{}.linear1",
        "final_norm_out.linear": "final_layer.adaLN_modulation.1",
    }
)
DOCUMENTED = ComposedKeyMap(TYPED, ORIGINAL)
NAMING = LoraNaming("dit", {"diffusers": DOCUMENTED, "comfyui": TYPED, "kohya": TYPED})
FORMATS = ("diffsynth", "diffusers", "comfyui", "kohya")
RANK, WIDTH = 3, 32
ROWS = {
    "blocks.0.ff_a.0": {"transformer_blocks.0.ff.net.0.proj": slice(0, 4 * WIDTH)},
    "blocks.0.attn.a_to_qkv": {
        "transformer_blocks.0.attn.to_q": slice(0, WIDTH),
        "transformer_blocks.0.attn.to_k": slice(WIDTH, 2 * WIDTH),
        "transformer_blocks.0.attn.to_v": slice(2 * WIDTH, 3 * WIDTH),
    },
    "blocks.0.attn.b_to_qkv": {
        "transformer_blocks.0.attn.add_q_proj": slice(0, WIDTH),
        "transformer_blocks.0.attn.add_k_proj": slice(WIDTH, 2 * WIDTH),
        "transformer_blocks.0.attn.add_v_proj": slice(2 * WIDTH, 3 * WIDTH),
    },
    "single_blocks.0.to_qkv_mlp": {
        "single_transformer_blocks.0.attn.to_q": slice(0, WIDTH),
        "single_transformer_blocks.0.attn.to_k": slice(WIDTH, 2 * WIDTH),
        "single_transformer_blocks.0.attn.to_v": slice(2 * WIDTH, 3 * WIDTH),
        "single_transformer_blocks.0.proj_mlp": slice(3 * WIDTH, 7 * WIDTH),
    },
    "final_norm_out.linear": {"norm_out.linear": [*range(WIDTH, 2 * WIDTH), *range(WIDTH)]},
}
"""Rows of a documented module's matrix that belong to each module here, by hand."""
MODULES = tuple(ROWS)
QKV = "blocks.0.attn.a_to_qkv"


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def with_lora(base: nn.Module, seed: int = 0, moved: bool = True) -> nn.Module:
    """Return the model with a LoRA on all modules, with B away from zero unless it is `fresh`."""
    model = deepcopy(base)
    add_lora(model, MODULES, RANK, seed, DOCUMENTED)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and ".lora_B." in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def predict(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    generator, dtype = torch.Generator().manual_seed(5), model.dtype
    inputs = {
        "hidden_states": torch.randn(2, 6, 4, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=generator).to(dtype),
        "pooled_projections": torch.randn(2, 10, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randint(0, 4, (6, 3), generator=generator).float(),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    return functional_call(model, dict(weights or {}), kwargs=inputs)[0]


def changed_weights(base: nn.Module, downs: Mapping[str, Tensor], ups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return W + B A of the matrix of each documented module, in the rows that each module here has of it."""
    return {
        f"{own}.weight": base.get_parameter(f"{own}.weight") + (ups[module] @ downs[module])[rows]
        for module, parts in ROWS.items()
        for own, rows in parts.items()
    }


def fused_halves(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of A and B of each documented module, as leaves."""
    weights = lora_weights(model, DOCUMENTED)
    assert weights.keys() == set(MODULES)
    downs = {name: halves.A.detach().clone().requires_grad_() for name, halves in weights.items()}
    ups = {name: halves.B.detach().clone().requires_grad_() for name, halves in weights.items()}
    return downs, ups


def gradients(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of A and B by documented module, with B's concatenated by hand."""
    trained = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    downs, ups = {}, {}
    for module, parts in ROWS.items():
        downs[module] = trained[f"{next(iter(parts))}.lora_A.default.weight"]
        up = torch.zeros(sum(len(trained[f"{own}.lora_B.default.weight"]) for own in parts), RANK)
        for own, rows in parts.items():
            up[rows] = trained[f"{own}.lora_B.default.weight"]
        ups[module] = up
    return downs, ups


def test_output_and_gradients_are_those_of_one_lora_on_the_whole_matrix(base):
    model = with_lora(base)
    downs, ups = fused_halves(model)
    expected = predict(base, changed_weights(base, downs, ups))
    output = predict(model)
    assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert (output - predict(base)).abs().max() > 1e-2, "the LoRA does something"

    (output**2).sum().backward()
    (expected**2).sum().backward()
    down_gradients, up_gradients = gradients(model)
    for module in MODULES:
        scale = downs[module].grad.abs().max()
        assert scale > 1e-3
        assert_close(down_gradients[module] / scale, downs[module].grad / scale, rtol=1e-5, atol=1e-5)
        scale = ups[module].grad.abs().max()
        assert_close(up_gradients[module] / scale, ups[module].grad / scale, rtol=1e-5, atol=1e-5)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_a_trains_once(base):
    model = with_lora(base)
    names = list(trained(model))
    assert sum(".lora_A." in name for name in names) == len(MODULES)
    assert sum(".lora_B." in name for name in names) == sum(map(len, ROWS.values()))
    attention = model.transformer_blocks[0].attn
    assert attention.to_q.lora_A["default"] is attention.to_k.lora_A["default"] is attention.to_v.lora_A["default"]
    model.to(torch.float64)
    assert attention.to_q.lora_A["default"].weight is attention.to_v.lora_A["default"].weight


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (predict(model) ** 2).mean().backward()
        optimizer.step()


def adamw(parameters) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def test_training_goes_the_way_of_the_whole_matrix(base):
    """In double precision: AdamW amplifies the smallest gradients."""
    base, model = deepcopy(base).double(), with_lora(base).double()
    downs, ups = fused_halves(model)
    train(model, adamw(trained(model).values()), 3)
    optimizer = adamw([*downs.values(), *ups.values()])
    for _ in range(3):
        optimizer.zero_grad()
        (predict(base, changed_weights(base, downs, ups)) ** 2).mean().backward()
        optimizer.step()
    for module, halves in lora_weights(model, DOCUMENTED).items():
        assert_close(halves.A, downs[module], rtol=1e-6, atol=1e-7)
        assert_close(halves.B, ups[module], rtol=1e-6, atol=1e-7)


def test_a_resumed_run_goes_on_bit_for_bit(base, tmp_path):
    straight = with_lora(base)
    optimizer = adamw(trained(straight).values())
    train(straight, optimizer, 2)
    save_state(tmp_path, LoopState(2, 4, {}), state_of(trained(straight), optimizer), keep=1)
    train(straight, optimizer, 2)

    resumed = with_lora(base, seed=9)
    optimizer = adamw(trained(resumed).values())
    restore_state(tmp_path / "state" / "step-2", LoopState(2, 4, {}), trained(resumed), optimizer)
    train(resumed, optimizer, 2)
    check_equal(resumed, straight)


def check_equal(model: nn.Module, other: nn.Module) -> None:
    first, second = lora_weights(model, DOCUMENTED), lora_weights(other, DOCUMENTED)
    assert first.keys() == second.keys()
    for module, halves in first.items():
        assert torch.equal(halves.A, second[module].A) and torch.equal(halves.B, second[module].B)


def test_the_start_is_that_of_the_whole_matrix(base):
    """The initialization depends on seed and documented name, not on the number of modules."""
    whole = nn.Module()
    whole.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"a_to_qkv": nn.Linear(WIDTH, 3 * WIDTH)})})])
    add_lora(whole, [QKV], RANK, seed=4)
    fresh = lora_weights(with_lora(base, seed=4, moved=False), DOCUMENTED)
    assert torch.equal(fresh[QKV].A, lora_weights(whole)[QKV].A)
    assert all(not halves.B.any() and halves.B.dtype == torch.float32 for halves in fresh.values())
    assert len({float(halves.A.detach()[0, 0]) for halves in fresh.values()}) == len(MODULES)


def save(model: nn.Module, lora_format: str, path: Path) -> dict[str, Tensor]:
    tensors = name_lora(lora_weights(model, DOCUMENTED), lora_format, NAMING)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return load_file(path)


@pytest.mark.parametrize("lora_format", FORMATS)
def test_files_of_every_dialect_come_back_bit_for_bit(base, tmp_path, lora_format):
    model = with_lora(base)
    tensors = save(model, lora_format, tmp_path / "lora.safetensors")
    match = match_lora_keys(tensors, MODULES, NAMING)
    assert (match.lora_format(NAMING), match.unmatched) == (lora_format, ())
    other = with_lora(base, seed=7)
    assert load_lora(other, tmp_path / "lora.safetensors", NAMING, DOCUMENTED) == len(MODULES)
    check_equal(other, model)


WRITTEN = {
    "diffsynth": (
        {f"{QKV}.lora_{half}.default.weight": shape for half, shape in (("A", (3, 32)), ("B", (96, 3)))},
        {"single_blocks.0.to_qkv_mlp.lora_B.default.weight": (224, 3)},
    ),
    "diffusers": (
        {f"transformer.transformer_blocks.0.attn.to_{part}.lora_A.weight": (3, 32) for part in "qkv"},
        {f"transformer.transformer_blocks.0.attn.to_{part}.lora_B.weight": (32, 3) for part in "qkv"},
        {"transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": (128, 3)},
    ),
    "comfyui": (
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (3, 32)},
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (96, 3)},
    ),
    "kohya": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (3, 32)},
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (96, 3)},
        {"lora_unet_double_blocks_0_img_attn_qkv.alpha": (), "lora_unet_final_layer_adaLN_modulation_1.alpha": ()},
        {"lora_unet_single_blocks_0_linear1.lora_up.weight": (224, 3)},
    ),
}
COUNTS = {"diffsynth": 10, "diffusers": 24, "comfyui": 10, "kohya": 15}


@pytest.mark.parametrize("lora_format", FORMATS)
def test_written_keys(base, tmp_path, lora_format):
    tensors = save(with_lora(base), lora_format, tmp_path / "lora.safetensors")
    assert len(tensors) == COUNTS[lora_format]
    for expected in WRITTEN[lora_format]:
        assert {name: tuple(tensors[name].shape) for name in expected} == expected
    assert all(tensor.item() == RANK for name, tensor in tensors.items() if name.endswith(".alpha"))


def test_diffusers_reads_its_dialect_and_computes_the_same(base, tmp_path, complaints):
    model = with_lora(base)
    save(model, "diffusers", tmp_path / "lora.safetensors")
    loaded = deepcopy(base)
    loaded.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    assert complaints() == []
    assert_close(predict(loaded), predict(model), rtol=1e-5, atol=1e-5)


def test_each_part_has_its_own_alpha(base, tmp_path):
    """A scale that the file states for the rows of k applies only to the rows of k."""
    model = with_lora(base)
    path = tmp_path / "lora.safetensors"
    tensors = save(model, "diffusers", path)
    renamed = {
        "lora_unet_" + name.removeprefix("transformer.").removesuffix(end).replace(".", "_") + ending: tensor
        for name, tensor in tensors.items()
        for end, ending in ((".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight"))
        if name.endswith(end)
    }
    renamed["lora_unet_transformer_blocks_0_attn_to_k.alpha"] = torch.tensor(RANK / 2)
    save_file(renamed, path)
    other = with_lora(base, seed=7)
    naming = LoraNaming("dit", {"kohya": DOCUMENTED})
    assert load_lora(other, path, naming, DOCUMENTED) == len(MODULES)
    expected = lora_weights(model, DOCUMENTED)[QKV].B.detach().clone()
    expected[WIDTH : 2 * WIDTH] /= 2
    assert torch.equal(lora_weights(other, DOCUMENTED)[QKV].B, expected)


def of_part(part: str, half: str) -> str:
    return f"transformer.transformer_blocks.0.attn.to_{part}.lora_{half}.weight"


def saved_with(base: nn.Module, path: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """Save a file in diffusers' format with some tensors replaced or removed."""
    tensors = save(with_lora(base), "diffusers", path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({of_part("k", "A"): torch.ones(3, 32)}, "has rank 6 at `blocks.0.attn.a_to_qkv`, but the run uses rank 3"),
        (
            {of_part("k", "A"): None},
            "the LoRA of `blocks.0.attn.a_to_qkv` (its part `transformer_blocks.0.attn.to_k`) has lora_B but no lora_A",
        ),
        (
            {of_part("v", "B"): torch.ones(31, 3)},
            "the LoRA of `blocks.0.attn.a_to_qkv` (its part `transformer_blocks.0.attn.to_v`) is [31, 3] x [3, 32], "
            "which does not match its weight [32, 32]",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_a_weight_changes(base, tmp_path, changes, expected):
    path = saved_with(base, tmp_path / "lora.safetensors", changes)
    model = with_lora(base, seed=7)
    with pytest.raises(DiffSynthError) as caught:
        load_lora(model, path, NAMING, DOCUMENTED)
    assert str(caught.value).startswith(f"`{path}`") and expected in str(caught.value)
    assert caught.value.problems[0].hint
    check_equal(model, with_lora(base, seed=7))


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({of_part("k", "A"): torch.ones(3, 32)}, 6),
        ({of_part("k", "A"): torch.ones(2, 32), of_part("k", "B"): torch.ones(32, 2)}, 5),
        ({of_part("k", "A"): None, of_part("k", "B"): None}, 3),
        ({of_part("k", "A"): torch.ones(2, 32), of_part("k", "B"): torch.ones(32, 2)}, 9),
    ],
)
def test_separate_loras_of_parts_start_one_of_their_joint_rank(base, tmp_path, changes, rank):
    """Block-diagonal, extended with a fresh start if the run has a higher rank: the output is that of the file."""
    path = saved_with(base, tmp_path / "lora.safetensors", changes)
    expected = deepcopy(base)
    expected.load_lora_adapter(load_file(path), prefix="transformer")
    model = deepcopy(base)
    add_lora(model, MODULES, rank, 7, DOCUMENTED)
    fresh = lora_weights(model, DOCUMENTED)[QKV].A.detach().clone()
    assert load_lora(model, path, NAMING, DOCUMENTED) == len(MODULES)
    assert_close(predict(model), predict(expected), rtol=1e-5, atol=1e-5)
    loaded = lora_weights(model, DOCUMENTED)[QKV]
    filled = rank if rank < 9 else 5
    assert torch.equal(loaded.A[filled:], fresh[filled:]) and not loaded.B[:, filled:].any()
