"""The presets for `accelerate launch --config_file`, as parsed by accelerate."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from diffsynth_core.config.recipes import recipe_folder

FOLDER = recipe_folder() / "accelerate"
EXPECTED = {
    "ddp": (DistributedType.MULTI_GPU, None, None),
    "fsdp2": (DistributedType.FSDP, None, None),
    "fsdp2offload": (DistributedType.FSDP, None, None),
    "zero2": (DistributedType.DEEPSPEED, 2, "none"),
    "zero2offload": (DistributedType.DEEPSPEED, 2, "cpu"),
    "zero3": (DistributedType.DEEPSPEED, 3, "none"),
}
"""Preset -> kind of distribution, ZeRO stage, device of the optimizer state."""


def read(name: str) -> ClusterConfig:
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def test_these_are_all():
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{name}.yaml" for name in sorted(EXPECTED)]


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_kind_of_distribution(name):
    config = read(name)
    kind, stage, optimizer = EXPECTED[name]
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == (kind, None, 8)
    assert config.deepspeed_config.get("zero_stage") == stage
    assert config.deepspeed_config.get("offload_optimizer_device") == optimizer
    assert "gradient_accumulation_steps" not in config.deepspeed_config, "it would override recipes"


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_knows_every_key(name):
    """accelerate silently ignores a key for which its launcher has no option."""
    options = vars(launch_command_parser().parse_args(["train.py"]))
    config = read(name)
    assert config.deepspeed_config.keys() | config.fsdp_config.keys() <= options.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_example_names_the_preset_itself(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"--config_file {Path('recipes/accelerate') / name}.yaml -m diffsynth_cli train" in text
