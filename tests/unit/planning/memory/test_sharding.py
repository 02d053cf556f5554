"""What each process holds if an engine divides a run, and which engine is named."""

from dataclasses import replace

import pytest

from diffsynth_cli.text.estimate import engine_lines
from diffsynth_core.models.size_facts import BYTES
from diffsynth_core.planning.documents import plan_of_recipe
from diffsynth_core.planning.machine.engines import EngineChoice
from diffsynth_core.planning.memory.disk import state_bytes
from diffsynth_core.planning.memory.estimate import device_memory, host_memory, training_memory
from diffsynth_core.planning.memory.fit_options import memory_options
from diffsynth_core.planning.memory.fitted import assumed_host_bytes
from diffsynth_core.planning.memory.fitting import engine_fits
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload

GIB = 2**30
OFFLOADING = EngineChoice(name="fsdp2", offload_optimizer=True, offload_weights=True)


@pytest.fixture(scope="module")
def full():
    """The plan of Qwen-Image in full, in eight processes with an engine."""
    (plan,) = plan_of_recipe("qwen-image-full")

    def divided(engine: EngineChoice, processes: int = 8):
        return replace(plan, machine=replace(plan.machine, world_size=processes, engine=engine))

    return divided


def memory_of(plan):
    return training_memory(plan, memory_config(plan, find_workload(plan).largest))


@pytest.mark.parametrize(
    ("name", "divided"),
    [
        ("zero1", ("optimizer",)),
        ("zero2", ("optimizer", "gradients")),
        ("zero3", ("optimizer", "gradients", "weights")),
        ("fsdp2", ("optimizer", "gradients", "weights")),
    ],
)
def test_an_engine_divides_what_its_name_says(full, name, divided):
    whole, parts = memory_of(full(EngineChoice())), memory_of(full(EngineChoice(name=name)))
    weights = sum(whole.weights.values())
    masters = whole.gradients / 8 if name.startswith("zero") else 0  # DeepSpeed updates a float32 copy of its part
    share = {part: 8 if part in divided else 1 for part in ("optimizer", "gradients", "weights")}
    assert parts.optimizer == pytest.approx(whole.optimizer / share["optimizer"] + masters, rel=1e-3)
    assert parts.gradients == pytest.approx(whole.gradients / share["gradients"], rel=1e-6)
    assert sum(parts.weights.values()) == pytest.approx(weights / share["weights"], rel=1e-6)
    assert bool(parts.gathered) == ("weights" in divided)
    assert bool(parts.autocast_weights) == ("weights" not in divided), "gathered weights are cast at each use"


def test_deepspeed_computes_with_bf16_weights_and_divides_all_that_is_float32(full):
    plan = full(EngineChoice(name="zero2"))
    rounded = replace(plan, training=replace(plan.training, dtype="bf16"))
    whole, halved = memory_of(plan), memory_of(rounded)
    assert sum(halved.weights.values()) == pytest.approx(sum(whole.weights.values()) / 2, rel=1e-3)
    assert (halved.gradients, halved.optimizer) == (whole.gradients, whole.optimizer)
    assert state_bytes(rounded) == state_bytes(plan)
    assert state_bytes(replace(rounded, machine=full(EngineChoice()).machine)) < state_bytes(plan)


def test_two_blocks_are_gathered_beside_what_stands_outside_of_blocks(full):
    plan = full(EngineChoice(name="fsdp2"))
    numbers = sum(memory_of(full(EngineChoice())).weights.values()) // BYTES["float32"]
    assert 2 * numbers / 60 < memory_of(plan).gathered / BYTES["float32"] < 2.2 * numbers / 60, "of 60 blocks"
    kept = memory_of(full(EngineChoice(name="fsdp2", reshards=False)))
    assert kept.gathered == pytest.approx(numbers * BYTES["float32"], rel=1e-6)


def test_what_is_offloaded_is_in_host_memory(full):
    here, there = full(EngineChoice(name="fsdp2")), full(OFFLOADING)
    config, encoded = memory_config(there, find_workload(there).largest), find_workload(there).encoded
    kept, moved = memory_of(here), memory_of(there)
    assert moved.offloaded >= sum(kept.weights.values()) + kept.gradients + kept.optimizer
    assert moved.total < kept.total - 0.9 * moved.offloaded + kept.update
    on_host = host_memory(there, config, device_memory(there, config), encoded)
    assert on_host["what FSDP2 offloads, in each process"] == moved.offloaded


def test_the_fastest_engine_that_fits_is_named(full):
    plan = full(EngineChoice())
    run = find_workload(plan)
    config, limit = memory_config(plan, run.largest), 80 * GIB
    fits = list(engine_fits(plan, config, limit, assumed_host_bytes(limit), run.encoded))
    assert [(fit.configuration, fit.fits) for fit in fits] == [("ddp", False), ("fsdp2", True), ("fsdp2offload", True)]
    assert list(engine_lines(plan, fits, limit))[-1] == "The fastest of those that fit is `--accelerate_config fsdp2`"


def test_a_lora_that_fits_without_sharding_is_told_so():
    (plan,) = plan_of_recipe("flux.2-klein-4b-lora")
    plan = replace(plan, machine=replace(plan.machine, world_size=2, engine=EngineChoice(name="fsdp2")))
    run, limit = find_workload(plan), 80 * GIB
    fits = list(engine_fits(plan, memory_config(plan, run.largest), limit, assumed_host_bytes(limit), run.encoded))
    assert "faster: pass `--accelerate_config ddp`" in list(engine_lines(plan, fits, limit))[-1]


def test_changes_that_the_engine_cannot_train_with_are_not_offered(full):
    def offered(engine: EngineChoice) -> set[str]:
        plan = full(engine, processes=2)
        options = memory_options(plan, memory_config(plan, find_workload(plan).largest))
        return {name for option in options for name in option.parameters}

    refused = {"enable_optimizer_cpu_offload"}
    assert refused <= offered(EngineChoice())
    assert not refused & offered(EngineChoice(name="fsdp2"))
    assert "trained_dtype" in offered(EngineChoice(name="fsdp2"))
    assert "trained_dtype" in offered(EngineChoice(name="zero2"))
