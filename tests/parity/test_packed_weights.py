"""Quantized weights are packed once: the next start reads them to the bit, and packs again only what is damaged."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.models import loading, packed_weights
from diffsynth_core.models.packed_weights import PackedWeights
from diffsynth_core.models.weight_store import FormatStore
from diffsynth_core.planning.memory.disk import disk_use, packed_bytes
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.progress import SilentReporter
from tests.parity.float8_runs import Step, plan_step

METHODS = {"cast": None, "fp8": "fp8", "int8": "int8", "nf4": "nf4"}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """Start a run with a transformer quantized by a method; return all that its layers keep."""
    monkeypatch.chdir(tmp_path)

    def start(method: str | None, **parameters: object) -> dict[str, Tensor]:
        step = Step(plan_step("qwen-image", tmp_path, ("dit",), method, **parameters))
        layers = {
            name: layer
            for name, layer in step.model.components["dit"].named_modules()
            if isinstance(layer, StoredLinear)
        }
        return {f"{name}.{leaf}": value for name, layer in layers.items() for leaf, value in layer.fetch().items()}

    return start


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of weights that are packed."""
    shapes: list[tuple[int, ...]] = []
    pack = FormatStore.pack

    def counting(self: FormatStore, weight: Tensor, scale: Tensor | None = None) -> object:
        shapes.append(tuple(weight.shape))
        return pack(self, weight, scale)

    monkeypatch.setattr(FormatStore, "pack", counting)
    return shapes


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache/weights").rglob("*.safetensors"))


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", METHODS)
def test_the_next_start_packs_nothing_and_keeps_the_same_bits(start, packed, tmp_path, monkeypatch, name):
    fresh = start(METHODS[name])
    count = len(packed)
    assert len(entries(tmp_path)) == count > 10
    read: list[str] = []
    iterate = loading.iterate_weights

    def watching(part, skipped):
        for key, *rest in iterate(part, skipped):
            read.append(key)
            yield key, *rest

    monkeypatch.setattr(loading, "iterate_weights", watching)
    check_equal(start(METHODS[name]), fresh)
    assert len(packed) == count and read
    kept = {f"{layer.replace('.base_layer', '')}.weight" for layer in (key.rpartition(".")[0] for key in fresh)}
    assert len(kept) == count and kept.isdisjoint(read), "nor are their files read"
    swapped = start(METHODS[name], blocks_to_swap=1)
    check_equal(swapped, fresh)
    assert len(packed) == count


def test_what_is_damaged_is_packed_again(start, packed, tmp_path):
    fresh, count = start("int8"), len(packed)
    cut, changed, *_ = entries(tmp_path)
    good = changed.read_bytes()
    cut.write_bytes(cut.read_bytes()[:-1])
    changed.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    check_equal(start("int8"), fresh)
    assert len(packed) == count + 2
    assert changed.read_bytes() == good
    check_equal(start("int8"), fresh)
    assert len(packed) == count + 2


def test_other_weights_and_methods_have_entries_of_their_own(start, packed, tmp_path):
    start("int8")
    count = len(packed)
    start("fp8")
    assert len(packed) == len(entries(tmp_path)) == 2 * count
    for path in plan_step("qwen-image", tmp_path, ("dit",), "int8").model.components["dit"].paths:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    start("int8")
    assert len(packed) == len(entries(tmp_path)) == 3 * count


def test_the_plan_tells_their_size(start, tmp_path):
    start("int8")
    plan = plan_step("qwen-image", tmp_path, ("dit",), "int8")
    kept = sum(tensor.nbytes for path in entries(tmp_path) for tensor in load_file(path).values())
    assert packed_bytes(plan) == {"dit": kept}
    assert packed_bytes(plan_step("qwen-image", tmp_path)) == {}


def test_without_room_on_the_disk_they_are_packed_each_time(start, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_weights, "free_bytes", lambda folder: 1000)
    fresh, count = start("int8"), len(packed)
    check_equal(start("int8"), fresh)
    assert len(packed) == 2 * count and not entries(tmp_path)


def test_no_room_is_left_for_encodings_that_are_written_before(start, packed, tmp_path, monkeypatch):
    plan = plan_step("qwen-image", tmp_path, ("dit",), "int8")
    run = find_workload(plan)
    use = disk_use(plan, memory_config(plan, run.largest), run.encoded)
    assert use.cache > 1000
    largest = max(math.prod(shape) for shape in plan.model.shapes["dit"].values()) + 1000
    monkeypatch.setattr(packed_weights, "free_bytes", lambda folder: use.written + largest)
    start("int8")
    assert len(entries(tmp_path)) == len(packed)


def test_that_there_is_no_room_is_told_once(tmp_path, monkeypatch):
    warnings: list[str] = []
    reporter = SilentReporter()
    monkeypatch.setattr(reporter, "warn", warnings.append, raising=False)
    monkeypatch.setattr(packed_weights, "free_bytes", lambda folder: 1000)
    cpu, cache = torch.device("cpu"), EncodingCache(tmp_path / "weights")
    with PackedWeights(cache, reporter, reserved=900) as weights:
        for name in ("fits", "does not", "nor does"):
            weights.keep(name, cpu, {"stored": torch.zeros(100 if name == "fits" else 101, dtype=torch.uint8)})
    assert len(warnings) == 1 and f"`{tmp_path / 'weights'}` has no room" in warnings[0]
    found = PackedWeights(cache, reporter, writes=False)
    assert [found.find(name, cpu) is not None for name in ("fits", "does not")] == [True, False]
