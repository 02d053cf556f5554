"""Several LoRAs as one: exact, or of a lower rank with the error of a full decomposition."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from diffsynth_core.adapters.deltas import WeightDelta
from diffsynth_core.adapters.merge import truncate
from diffsynth_core.conversion.add_loras import AddResult, add_loras
from diffsynth_core.conversion.add_plan import plan_addition
from diffsynth_core.conversion.provenance import MERGED, InputHashes
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.weighted_files import WeightedFile
from tests.naming import names

METADATA = {"format": "pt", "family": "x", "modelspec.architecture": "x/lora"}
ROWS, COLUMNS = 12, 9


def halves(
    module: str, rank: int, seed: int, alpha: float | None = None, kernel: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """A LoRA in kohya's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{module}.lora_down.weight": torch.randn(rank, COLUMNS, *kernel, generator=generator),
        f"{module}.lora_up.weight": torch.randn(ROWS, rank, *[1] * len(kernel), generator=generator),
    }
    return tensors | ({f"{module}.alpha": torch.tensor(alpha)} if alpha is not None else {})


def changes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the change of each module of a file, as computed by its readers."""
    found = {}
    for key in tensors:
        module, down, _ = key.rpartition(".lora_down.weight")
        if down:
            up = tensors[f"{module}.lora_up.weight"]
            scale = tensors.get(f"{module}.alpha", torch.tensor(float(up.shape[1]))) / up.shape[1]
            found[module] = scale * up.flatten(1) @ tensors[key].flatten(1)
    return found


@pytest.fixture
def run(tmp_path):
    """Add files with weights; return the result's tensors and messages."""

    def run(*files: tuple[Mapping[str, Tensor], float], **choices) -> tuple[dict[str, Tensor], AddResult]:
        given = []
        for number, (tensors, weight) in enumerate(files):
            path = tmp_path / f"{number}.safetensors"
            save_file(dict(tensors), path, METADATA | {"ss_network_dim": "4", "modelspec.title": "one of both"})
            given.append(WeightedFile(path, weight))
        plan = plan_addition(given, tmp_path / "out.safetensors", **choices)
        result = add_loras(plan, InputHashes(plan.inputs), SilentReporter())
        return load_file(plan.output), result

    return run


def test_ranks_add_and_scales_and_weights_are_folded_in(run, tmp_path):
    first = halves("lora_unet_a", 2, seed=0, alpha=1.0) | halves("lora_unet_conv", 2, seed=3, kernel=(3, 3))
    second = halves("lora_unet_a", 3, seed=1, alpha=6.0) | halves("lora_unet_b", 1, seed=2)
    found, _ = run((first, 0.5), (second, -2.0))
    before = changes(first), changes(second)
    after = changes(found)
    assert found["lora_unet_a.lora_down.weight"].shape == (5, COLUMNS) and found["lora_unet_a.alpha"] == 5
    assert found["lora_unet_conv.lora_down.weight"].shape == (2, COLUMNS, 3, 3)
    assert found["lora_unet_conv.lora_up.weight"].shape == (ROWS, 2, 1, 1)
    assert "lora_unet_b.alpha" not in found, "none of the files has one"
    assert_close(after["lora_unet_a"], 0.5 * before[0]["lora_unet_a"] - 2 * before[1]["lora_unet_a"])
    assert_close(after["lora_unet_conv"], 0.5 * before[0]["lora_unet_conv"])
    assert_close(after["lora_unet_b"], -2 * before[1]["lora_unet_b"])
    with safe_open(tmp_path / "out.safetensors", framework="pt") as stream:
        metadata = stream.metadata()
    assert [entry["weight"] for entry in json.loads(metadata.pop(MERGED))[0]["loras"]] == [0.5, -2.0]
    assert metadata == METADATA


def test_concatenation_by_hand(run):
    """One element in each matrix: (2 x 5) at one index, and the same at half the weight from another file."""
    one = {
        "lora_unet_a.lora_down.weight": torch.tensor([[0.0, 2.0]]),
        "lora_unet_a.lora_up.weight": torch.tensor([[5.0]]),
    }
    found, _ = run((one, 1.0), (one, 0.5))
    assert found["lora_unet_a.lora_down.weight"].equal(torch.tensor([[0.0, 2.0], [0.0, 2.0]]))
    assert found["lora_unet_a.lora_up.weight"].equal(torch.tensor([[5.0, 2.5]]))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lower_rank_loses_what_a_full_decomposition_says(run, rank):
    first, second = halves("lora_unet_a", 3, seed=0, alpha=2.0), halves("lora_unet_a", 3, seed=1)
    found, result = run((first, 1.0), (second, -0.7), rank=rank)
    whole = changes(first)["lora_unet_a"].double() - 0.7 * changes(second)["lora_unet_a"].double()
    values = numpy.linalg.svd(whole.numpy(), compute_uv=False)
    share = float(numpy.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
    assert result.error.value == pytest.approx(share, abs=1e-7)
    assert result.errors["lora_unet_a"].value == pytest.approx(share, abs=1e-7)
    nearest = changes(found)["lora_unet_a"].double()
    assert found["lora_unet_a.lora_down.weight"].shape[0] == rank
    assert float((whole - nearest).norm() / whole.norm()) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (5, 5)])
def test_a_rank_above_the_sides_of_a_weight(shape):
    """A change of rank 8 of a weight with a side of 5."""
    generator = torch.Generator().manual_seed(0)
    whole = WeightDelta(torch.randn(8, shape[1], generator=generator), torch.randn(shape[0], 8, generator=generator))
    nearest, loss = truncate(whole, 5)
    assert nearest.rank == 5 and loss.value < 1e-7
    assert_close(nearest.B @ nearest.A, whole.B @ whole.A, rtol=1e-4, atol=1e-4)
    assert truncate(whole, 2)[1].value > 0.1


def test_narrow_files_lose_nothing(run):
    narrow = {name: tensor.bfloat16() for name, tensor in halves("lora_unet_a", 2, seed=0).items()}
    found, _ = run((narrow, 3.0), (narrow, 1.0))
    assert found["lora_unet_a.lora_up.weight"].equal(
        torch.cat([3 * narrow["lora_unet_a.lora_up.weight"].float(), narrow["lora_unet_a.lora_up.weight"].float()], 1)
    )


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            halves("lora_unet_a", 2, 0),
            halves("transformer.a", 2, 0),
            names("none of its 2 keys", "Qwen-Image, Wan"),
        ),
        (halves("lora_unet_a", 2, 0), {"lora_unet_a.lora_down.weight": torch.ones(1, 2)}, names("lora_A", "no lora_B")),
        (
            halves("lora_unet_a", 2, 0),
            {"lora_unet_a.lora_down.weight": torch.ones(1, 2), "lora_unet_a.lora_up.weight": torch.ones(3, 1)},
            names("lora_unet_a", "other shapes"),
        ),
        (halves("lora_unet_a", 2, 0), {"lora_unet_a.norm": torch.ones(2)}, names("1 of 1 key", "not a LoRA key")),
        (halves("lora_unet_a", 2, 0), {"lora_unet_a.dora_scale": torch.ones(2)}, names("DoRA")),
        (
            halves("lora_unet_a", 2, 0),
            halves("lora_unet_a", 2, 0) | {"lora_unet_a.lora_up.weight": torch.full((ROWS, 2), torch.inf)},
            names("lora_unet_a.lora_up.weight", "NaN or Inf"),
        ),
        (halves("lora_unet_a", 2, 0), halves("lora_unet_a", 2, 0, alpha=float("nan")), names("finite number")),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_written(says, run, tmp_path, first, second, message):
    with pytest.raises(DiffSynthError) as caught:
        run((first, 1.0), (second, 1.0))
    says(caught.value.problems)
    assert str(caught.value) == message
    assert not Path(tmp_path / "out.safetensors").exists()
