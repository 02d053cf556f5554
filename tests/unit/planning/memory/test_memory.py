"""What the estimate of a run adds up, and which changes it finds, on plans made without model files."""

import math
from dataclasses import replace

import pytest

from diffsynth_core.data.sampling import Sampling
from diffsynth_core.planning.memory.disk import checkpoint_bytes, count_checkpoints, disk_use, most_states, state_bytes
from diffsynth_core.planning.memory.estimate import (
    PREFETCHED,
    DeviceMemory,
    EncodingMemory,
    encoding_memory,
    host_memory,
    training_memory,
)
from diffsynth_core.planning.memory.memory_config import MemoryConfig, memory_config
from diffsynth_core.planning.memory.sizes import Workload, find_workload
from diffsynth_core.planning.memory.trained_sizes import count_trained
from diffsynth_core.planning.output.states_on_disk import state_problems
from diffsynth_core.planning.plan import RunPlan


def chosen(plan: RunPlan, **changes: object) -> tuple[MemoryConfig, Workload]:
    sizes = find_workload(plan)
    return replace(memory_config(plan, sizes.largest), **changes), sizes


def test_a_component_that_trains_does_not_come_and_go_as_an_encoder(plan):
    frozen, online = plan(), plan(trainable_models=["dit", "text_encoder_1"])
    names = [part.component for part in encoding_memory(frozen, chosen(frozen)[0])]
    assert names == ["text_encoder_1", "text_encoder_2", "vae"]
    assert [part.component for part in encoding_memory(online, chosen(online)[0])] == names[1:]


def test_the_peak_is_that_of_the_fullest_stage():
    small, large = EncodingMemory("vae", 1, 2), EncodingMemory("text_encoder", 5, 0)
    assert DeviceMemory(None, (small, large)).peak == 5
    assert DeviceMemory(None, ()).peak == 0


def test_offloaded_inputs_of_a_block_are_on_the_device_while_it_is_recomputed(plan):
    made = plan()
    config, _ = chosen(made, recompute=True)
    here, away = (training_memory(made, replace(config, offload=offload)) for offload in (False, True))
    # Of the many kept inputs those of one block come back, and those of the next one meanwhile, so that a few large
    # tensors are the difference.
    assert here.activations == away.on_host + away.activations - 2 * _inputs_of_a_block(made, config)
    assert here.on_host == 0


def _inputs_of_a_block(plan: RunPlan, config: MemoryConfig) -> int:
    """Text and image states in bfloat16, and the vector of the time."""
    width = plan.model.shapes["dit"]["x_embedder.weight"][0]
    _, height, wide = config.sizes.images[0]
    return 2 * width * (height // 16 * (wide // 16) + 512 + 1)


@pytest.mark.parametrize(("save_steps", "expected"), [(None, 2), (3, 3), (4, 2), (100, 1)])
def test_the_last_checkpoint_counts(plan, dataset, save_steps, expected):
    made = plan(dataset_base_path=str(dataset), save_steps=save_steps, num_epochs=2, dataset_repeat=1)
    assert made.data.steps.total_steps == 8
    assert count_checkpoints(made) == expected


def test_checkpoints_and_state_on_disk(plan):
    made, half = plan(), plan(save_dtype="bfloat16")
    numbers = count_trained(made)
    assert (checkpoint_bytes(made), checkpoint_bytes(half)) == (4 * numbers, 2 * numbers)
    config, sizes = chosen(made)
    # Resuming needs the weights in float32 and both moments of AdamW.
    assert disk_use(made, config, sizes.encoded).state == numbers * (4 + 8)


@pytest.mark.parametrize(
    ("settings", "states"),
    [({}, 2), ({"keep_states": 1}, 2), ({"save_state_steps": 1}, 3), ({"save_state_steps": 1, "keep_states": 5}, 6)],
)
def test_one_state_more_than_are_kept_is_on_disk_while_it_is_written(plan, dataset, settings, states):
    """Of two epochs with a state each there are two at most."""
    made = plan(dataset_base_path=str(dataset), num_epochs=2, dataset_repeat=1, **settings)
    assert most_states(made, made.parameters.keep_states) == states


def test_states_that_do_not_fit_the_disk_are_told_with_the_way_out(plan, dataset, tmp_path):
    made = plan(dataset_base_path=str(dataset), save_state_steps=1, output_path=str(tmp_path / "out"))
    state, checkpoint = state_bytes(made), checkpoint_bytes(made)
    assert state_problems(made, free=3 * state + checkpoint) == []
    [problem] = state_problems(made, free=3 * state + checkpoint - 1)
    assert problem.message.startswith("3 states to resume from (")
    assert problem.hint and problem.hint.startswith("pass `--keep_states 1`, which takes ")
    [problem] = state_problems(made, free=2 * state)
    assert problem.hint == "free some space, or choose another `--output_path`"
    # Those that new ones will take the place of count as free.
    written = tmp_path / "out/state/step-3/trained.safetensors"
    written.parent.mkdir(parents=True)
    with written.open("wb") as stream:
        stream.truncate(state)
    assert state_problems(made, free=2 * state + checkpoint) == []


def test_each_worker_has_micro_batches_ready(plan, dataset):
    made = plan(dataset_base_path=str(dataset), dataset_num_workers=3, batch_size=2, dataset_repeat=2)
    config, sizes = chosen(made)
    sample = sizes.encoded.bytes_in("bf16") // len(made.data.samples.samples)
    ready = host_memory(made, config, DeviceMemory(None, ()), sizes.encoded)["samples prefetched by 3 workers"]
    assert ready == 3 * PREFETCHED * config.sizes.batch * sample
    assert PREFETCHED == 2  # the default of PyTorch's DataLoader, which the loader leaves


def test_batches_are_filled_from_repeated_samples(plan, dataset):
    once, often = (plan(dataset_base_path=str(dataset), batch_size=8, dataset_repeat=count) for count in (1, 8))
    largest = max(
        sum(one.bucket == other.bucket for other in once.data.samples.samples) for one in once.data.samples.samples
    )
    assert find_workload(once).largest.batch == largest < 8
    assert find_workload(often).largest.batch == 8


def test_the_largest_micro_batch_has_the_longest_text_of_all(plan, dataset):
    made = plan("qwen-image-lora", dataset_base_path=str(dataset))
    samples = [replace(sample, caption="x" * 40 * number) for number, sample in enumerate(made.data.samples.samples, 1)]
    spread = replace(made, data=replace(made.data, samples=replace(made.data.samples, samples=tuple(samples))))
    assert find_workload(spread).largest.text_tokens == 10 * len(samples) + 5


def test_many_small_images_may_be_more_than_one_large_one(plan, dataset):
    made = plan(dataset_base_path=str(dataset), batch_size=3, dataset_repeat=1)
    sample, *_ = made.data.samples.samples
    frames, height, width = sample.target.shape

    tall = replace(sample, target=replace(sample.target, height=2 * height))
    samples = (tall, sample, sample, sample)
    many = replace(made, data=replace(made.data, samples=replace(made.data.samples, samples=samples)))
    largest = find_workload(many).largest
    assert (largest.batch, largest.images) == (3, ((frames, height, width),))


def test_each_step_of_the_sampler_keeps_as_much_again(plan, dataset):
    made = plan(dataset_base_path=str(dataset))
    config, _ = chosen(made)

    def kept(*steps: int) -> int:
        samples = [
            replace(sample, sampling=Sampling(0, "cpu", count))
            for sample, count in zip(made.data.samples.samples, steps, strict=False)
        ]
        spread = replace(made, data=replace(made.data, samples=replace(made.data.samples, samples=tuple(samples))))
        return training_memory(spread, replace(config, recompute=False)).activations

    assert kept(2, 4, 3) == 4 * kept(1)


@pytest.mark.parametrize(("precision", "converted"), [("no", 4), ("bf16", 2)])
def test_a_tensor_is_in_host_memory_as_its_file_stores_it_and_converted(plan, precision, converted):
    made = plan(mixed_precision=precision)
    numbers = max(math.prod(shape) for shape in made.model.shapes["text_encoder_2"].values())  # published in bfloat16
    config, sizes = chosen(made)
    parts = host_memory(made, config, DeviceMemory(None, ()), sizes.encoded)
    assert parts["the largest tensor while it is loaded"] == numbers * (2 + converted)
