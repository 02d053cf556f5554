"""DeepSpeed ZeRO by the launches that are documented for DiffSynth-Studio, with each of its configurations."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.runs.engines import difference
from tests.runs.test_processes import ACCUMULATING, COMMON, launch, train_here

CLUSTER = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "DEEPSPEED",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "num_machines": 1,
    "num_processes": 8,
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": False,
}
OFFLOAD = {"device": "cpu", "pin_memory": True}


def zero(stage: int, offload: str = "none", **more: object) -> dict[str, object]:
    """The section of a file of DiffSynth-Studio for a stage, which offloads optimizer and weights or neither."""
    return {
        "gradient_accumulation_steps": 1,
        "offload_optimizer_device": offload,
        "offload_param_device": offload,
        "zero3_init_flag": False,
        "zero_stage": stage,
        **more,
    }


FILES = {
    "accelerate_config.yaml": {**CLUSTER, "mixed_precision": "bf16", "deepspeed_config": zero(2)},
    "accelerate_config_zero2offload.yaml": {**CLUSTER, "mixed_precision": "bf16", "deepspeed_config": zero(2, "cpu")},
    "accelerate_config_zero3.yaml": {
        **CLUSTER,
        "mixed_precision": "bf16",
        "deepspeed_config": zero(3, zero3_init_flag=True, zero3_save_16bit_model=True),
    },
    "deepspeed_zero3_cpuoffload.yaml": {
        **CLUSTER,
        "num_processes": 1,
        "deepspeed_config": {"deepspeed_config_file": "ds_z3_cpuoffload.json", "zero3_init_flag": True},
    },
}
"""Its accelerate configurations by name; those of one content stand here once."""
Z3_CPUOFFLOAD = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 5e7,
        "stage3_prefetch_bucket_size": 5e7,
    },
    "activation_checkpointing": {"partition_activations": False, "contiguous_memory_optimization": False},
}
LORA, FULL = "qwen-image-lora", "qwen-image-full"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the configurations."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "ds_z3_cpuoffload.json").write_text(json.dumps(Z3_CPUOFFLOAD))
    for name, content in FILES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def flags(photographs, folder) -> Callable[[str, str], list[str]]:
    """The flags of a run: recipe and name of the folder."""

    def flags(recipe: str, name: str) -> list[str]:
        dataset = ["--dataset_base_path", str(photographs), "--dataset_repeat", "1", "--num_epochs", "1"]
        precision = ["--mixed_precision", "no", "--save_dtype", "float32"]
        # Gradients near zero have a random sign, which Adam would make whole steps of.
        steps = ["--optimizer_args", "eps=1e-3"]
        return ["--recipe", recipe, *dataset, *precision, *steps, "--output_path", str(folder / name)]

    return flags


@pytest.fixture(scope="module")
def alone(recipe_models, flags, folder) -> Callable[[str], Path]:
    """The checkpoint of one process that accumulates, by recipe."""

    def alone(recipe: str) -> Path:
        output = folder / f"alone-{recipe}"
        if not output.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                train_here(
                    [*flags(recipe, output.name), "--gradient_accumulation_steps", "2"], recipe_models(LORA, FULL)
                )
        return output / "epoch-0.safetensors"

    return alone


def check_same(checkpoint: Path, wanted: Path) -> None:
    """Check that a checkpoint has the same tensors, within 1e-5."""
    ours, theirs = load_file(checkpoint), load_file(wanted)
    assert ours.keys() == theirs.keys()
    off = max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())
    print(f"{checkpoint.parent.name}: off by {off:.1e}")
    assert off < 1e-5
    assert checkpoint.stat().st_size == wanted.stat().st_size


LAUNCHES = [
    pytest.param(FULL, (), ("--accelerate_config", "zero2offload", "--num_processes", "2"), id="ours"),
    pytest.param(
        LORA,
        ("--config_file", "accelerate_config_zero3.yaml", "--num_processes", "2"),
        (),
        id="zero3 of a LoRA",
        marks=pytest.mark.long,
    ),
    *(
        pytest.param(FULL, ("--config_file", name, "--num_processes", "2"), (), id=name, marks=pytest.mark.long)
        for name in FILES
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "launcher", "arguments"), LAUNCHES)
def test_a_documented_launch_writes_the_checkpoint_of_one_process(
    recipe_models, alone, flags, folder, recipe, launcher: Sequence[str], arguments: Sequence[str]
):
    name = f"run-{len(list(folder.iterdir()))}"
    launcher = (*launcher, "--main_process_port", "0") if launcher else ()
    process = launch([*flags(recipe, name), *arguments], recipe_models(LORA, FULL), folder, launcher)
    reported, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert reported.count("Checkpoint  ") == 1, "one process tells"
    assert "Warning" not in errors, errors
    overridden = "`mixed_precision` is `no` (`--mixed_precision`), which takes precedence over `bf16`"
    assert (overridden in errors) == any("mixed_precision" in FILES.get(word, {}) for word in launcher)
    check_same(folder / name / "epoch-0.safetensors", alone(recipe))


CONTINUED = [
    pytest.param("zero2", id="zero2"),
    pytest.param("zero3 offload", id="zero3 offload", marks=pytest.mark.long),
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", CONTINUED)
def test_a_run_continues_from_one_process_in_two_and_back(
    recipe_models, flags, folder, two_processes, monkeypatch, engine
):
    """Its weights and optimizer are those of a run that never stopped."""
    monkeypatch.chdir(folder)
    models, name = recipe_models(LORA, FULL), f"continued-{engine.replace(' ', '-')}"
    alone, output = folder / f"whole-{name}", folder / name

    def steps(name: str, count: int, *more: str) -> list[str]:
        return [*flags(FULL, name), "--dataset_repeat", "3", "--max_steps", str(count), "--save_steps", "2", *more]

    train_here([*steps(alone.name, 6), *ACCUMULATING], models)
    train_here([*steps(name, 2), *ACCUMULATING], models)
    two_processes.train(engine, {output: [*COMMON, *steps(name, 4, "--resume", "auto")]}, models)
    train_here([*steps(name, 6, "--resume", "auto"), *ACCUMULATING], models)
    losses, weights = difference(alone, output)
    print(f"{engine} between one process and one: losses off by {losses:.1e}, weights by {weights:.1e}")
    assert losses < 1e-5 and weights < 1e-5
    for file in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run / "state" / "step-6" / file) for run in (output, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(tensor, theirs[key], atol=1e-5) for key, tensor in ours.items())
