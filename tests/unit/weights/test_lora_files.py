"""LoRA files that do not match: each gives one clear error, from headers alone, and no partial match is silent."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth_core.adapters.lora import add_lora, load_lora, lora_weights
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.lora_files import read_lora_file
from diffsynth_core.weights.lora_formats import LoraNaming
from tests.naming import names

BASE = {"q": (6, 4), "k": (6, 4), "conv": (5, 3, 2, 2)}


def halves(module: str, down=(2, 4), up=(6, 2)) -> dict[str, torch.Tensor]:
    """The LoRA of one module in the documented format."""
    return {f"{module}.lora_A.default.weight": torch.ones(down), f"{module}.lora_B.default.weight": torch.ones(up)}


@pytest.fixture
def save(tmp_path):
    def save(tensors) -> object:
        save_file(tensors, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    return save


def model(*targets: str, rank: int = 2) -> nn.Module:
    module = nn.Module()
    module.q, module.k = nn.Linear(4, 6), nn.Linear(4, 6)
    module.requires_grad_(False)
    add_lora(module, targets, rank, 0)
    return module


def test_a_file_that_fits_tells_its_ranks(save):
    tensors = halves("q") | halves("k", (3, 4), (6, 3)) | halves("conv", (7, 3, 2, 2), (5, 7, 1, 1))
    assert read_lora_file(save(tensors), BASE).ranks == {"q": 2, "k": 3, "conv": 7}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (halves("gone"), names("2 of 2", "no module", "gone.lora_A.default.weight", "gone.lora_B.default.weight")),
        ({"q.weight": torch.ones(6, 4)}, names("1 of 1", "no module", "q.weight")),
        (halves("q") | {"q.dora_scale": torch.ones(1)}, names("DoRA", "not supported", "q.dora_scale")),
        ({"q.lora_A.default.weight": torch.ones(2, 4)}, names("q", "lora_A", "no lora_B")),
        ({"q.lora_B.default.weight": torch.ones(6, 2)}, names("q", "lora_B", "no lora_A")),
        (halves("q", (2, 5)), names("q", "[6, 2] x [2, 5]", "not match", "[6, 4]")),
        (halves("q", (2, 4), (7, 2)), names("q", "[7, 2] x [2, 4]", "not match", "[6, 4]")),
        (halves("q", (2, 4), (6, 3)), names("q", "[6, 3] x [2, 4]")),
        (halves("q", (4, 2), (2, 6)), names("q", "[2, 6] x [4, 2]")),
        (halves("q", (2, 4), (6,)), names("q", "[6] x [2, 4]")),
        (halves("q", (2, 4), (6, 2, 1, 1)), names("q", "[6, 2, 1, 1] x [2, 4]")),
        (halves("q", (), ()), names("q", "[] x []")),
        (halves("conv", (2, 3, 3, 3), (5, 2, 1, 1)), names("conv", "[5, 2, 1, 1] x [2, 3, 3, 3]")),
    ],
)
def test_a_file_that_does_not_fit_is_refused(says, save, tensors, expected):
    path = save(tensors)
    with pytest.raises(DiffSynthError) as caught:
        read_lora_file(path, BASE)
    says(caught.value.problems)
    assert str(caught.value) == names(path, expected)
    assert caught.value.problems[0].hint


def test_what_stands_beside_the_lora_may_be_named(save):
    path = save(halves("q") | {"pipe.vae.conv.weight": torch.ones(1)})
    assert read_lora_file(path, BASE, besides=["pipe.vae.conv.weight"]).ranks == {"q": 2}


@pytest.mark.parametrize(
    ("beside", "reported"),
    [
        (["pipe.vae.conv.weight"], names("1 full weight", "vae")),
        (
            ["pipe.text_encoder.a.weight", "pipe.vae.b.gamma", "pipe.vae.c.bias"],
            names("3 full weights", "text_encoder", "vae"),
        ),
        (["q.weight", "norm.weight", "q.bias"], names("3 full weights", "dit")),
        (["q.weight", "pipe.vae.conv.weight"], names("2 full weights", "dit", "vae")),
    ],
)
@pytest.mark.parametrize("prefix", ["", "pipe.dit."])
def test_a_checkpoint_of_full_weights_and_a_lora_is_told_as_what_it_is(says, save, beside, reported, prefix):
    """Saved by a run that trains modules in full next to a LoRA: its full weights are not silently dropped."""
    path = save(halves(f"{prefix}q") | {name: torch.ones(1) for name in beside})
    with pytest.raises(DiffSynthError) as caught:
        read_lora_file(path, BASE)
    assert str(caught.value) == names(path, reported, "LoRA of dit")
    says(caught.value.problems)
    assert "`--resume auto`" in caught.value.problems[0].hint


def test_a_file_without_tensors_is_refused(save):
    path = save({})
    with pytest.raises(DiffSynthError, match="contains no LoRA"):
        read_lora_file(path, BASE)


def test_the_lora_of_another_component_is_refused(says, save):
    path = save(halves("pipe.text_encoder.q"))
    assert read_lora_file(path, BASE, LoraNaming("text_encoder")).ranks == {"q": 2}
    with pytest.raises(DiffSynthError) as caught:
        read_lora_file(path, BASE, LoraNaming("dit"))
    says(caught.value.problems)
    assert str(caught.value) == names(path, "2 of 2", "no module")


def test_an_alpha_without_its_halves_is_refused(says, save):
    path = save({"lora_unet_q.alpha": torch.tensor(1.0)})
    with pytest.raises(DiffSynthError) as caught:
        read_lora_file(path, BASE)
    says(caught.value.problems)
    assert str(caught.value) == names(path, "q", "no lora_A and no lora_B")


def test_a_file_with_two_spellings_of_one_module_is_refused(save):
    path = save(halves("q") | halves("pipe.dit.q"))
    with pytest.raises(DiffSynthError, match=r"lora\.safetensors"):
        read_lora_file(path, BASE)


def test_a_file_that_fits_nothing_of_this_model_is_refused_before_a_weight_changes(save):
    module = model("q", "k")
    before = {name: pair.A.clone() for name, pair in lora_weights(module).items()}
    path = save(halves("q") | halves("gone"))
    with pytest.raises(DiffSynthError, match="`gone"):
        load_lora(module, path)
    assert all(torch.equal(pair.A, before[name]) for name, pair in lora_weights(module).items())


def test_another_rank_is_told_with_the_rank_to_give(says, save):
    path = save(halves("q", (3, 4), (6, 3)))
    with pytest.raises(DiffSynthError) as caught:
        load_lora(model("q"), path)
    says(caught.value.problems)
    assert str(caught.value) == names(path, "rank 3", "q", "rank 2")
    assert caught.value.problems[0].hint == names("--lora_rank 3")


def test_modules_that_the_file_leaves_out_keep_their_start(save):
    module = model("q", "k")
    start = lora_weights(module)["k"].A.clone()
    assert load_lora(module, save(halves("q"))) == 1
    assert torch.equal(lora_weights(module)["k"].A, start)
    assert lora_weights(module)["q"].A.eq(1).all() and lora_weights(module)["q"].B.eq(1).all()


def test_modules_of_the_file_without_a_lora_here_are_passed_over(save):
    module = model("q")
    assert load_lora(module, save(halves("q") | halves("k"))) == 1
    assert set(lora_weights(module)) == {"q"}


def test_a_file_that_fills_nothing_is_refused(says, save):
    path = save(halves("k"))
    with pytest.raises(DiffSynthError) as caught:
        load_lora(model("q"), path)
    says(caught.value.problems)
    assert str(caught.value) == names(path, "no LoRA", "1 trained module")


def test_the_base_stays_as_it_is(save):
    module = model("q")
    before = module.q.base_layer.weight.clone()
    load_lora(module, save(halves("q")))
    assert torch.equal(module.q.base_layer.weight, before)
