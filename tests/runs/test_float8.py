"""Runs with frozen weights in 8-bit floats: messages, bit-exact resuming, separate encodings."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ENTRIES

RECIPE = ("--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--dataset_repeat", 2, "--num_epochs", 1)
NARROW = ("--fp8_models", f"{ENTRIES['dit']},{ENTRIES['text_encoder']}")


@pytest.fixture
def train(cli, photographs, tmp_path):
    def run(name: str, *more: object):
        flags = ("--output_path", tmp_path / name, "--cache_path", tmp_path / "cache", "--learning_rate", 0.01)
        return cli("train", *RECIPE, "--dataset_base_path", photographs, *flags, *more)

    return run


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(folder.glob("*-*.safetensors"))[-1])


def test_a_stopped_run_goes_on_to_the_same_bits(train, tmp_path):
    assert train("through", *NARROW).code == 0
    assert train("pieces", *NARROW, "--resume", "auto", "--max_steps", 3).code == 0
    assert train("pieces", *NARROW, "--resume", "auto").code == 0
    through, pieces = lora_of(tmp_path / "through"), lora_of(tmp_path / "pieces")
    assert through.keys() == pieces.keys()
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in through.items())
    assert train("wide").code == 0
    assert any(not torch.equal(tensor, through[name]) for name, tensor in lora_of(tmp_path / "wide").items())


def test_the_plan_says_what_is_kept_so(train):
    outcome = train("out", *NARROW, "--dry-run", "-v")
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.startswith("  ")}
    assert "% of its weights stored in float8 and LoRA of rank 32" in lines["dit"]
    assert lines["text_encoder"].endswith("% of its weights stored in float8")
    assert "float8" not in lines["vae"]


def test_of_a_component_without_such_layers_nothing_is_kept_so(train):
    outcome = train("out", "--fp8_models", ENTRIES["vae"], "--dry-run", "-v")
    [line] = [line for line in outcome.out.splitlines() if line.startswith("  vae")]
    assert line.endswith("no weights that can be stored in float8")


def test_encodings_of_rounded_encoders_are_not_taken_for_others(train, tmp_path):
    """8-bit storage of the transformer, or of a VAE without suitable layers, encodes nothing again."""
    assert train("wide").code == 0
    count = len(list((tmp_path / "cache" / "encodings").rglob("*.safetensors")))
    same = train("dit", "--fp8_models", f"{ENTRIES['dit']},{ENTRIES['vae']}")
    assert same.code == 0 and "Loading text_encoder" not in same.err and "Loading vae" not in same.err
    other = train("text", *NARROW)
    assert other.code == 0 and "Loading text_encoder" in other.err and "Loading vae" not in other.err
    assert len(list((tmp_path / "cache" / "encodings").rglob("*.safetensors"))) == count + 4


def test_a_resumed_run_keeps_the_same_components_so(train, tmp_path):
    assert train("out", *NARROW, "--max_steps", 2).code == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["float8_components"] == ["dit", "text_encoder"]
    outcome = train("out", "--resume", "auto")
    assert outcome.code == 2
    assert "`fp8_models` kept dit, text_encoder in 8-bit floats in the run in" in outcome.err
    assert "now nothing" in outcome.err


def test_a_rehearsal_keeps_the_stand_ins_so(train):
    outcome = train("out", "--rehearse", *NARROW, "--max_steps", 2, "-v")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("of its weights stored in float8") >= 2


def test_a_text_encoder_with_a_lora_can_be_kept_so(train, tmp_path):
    """Its output is computed in each step, with gradients through the 8-bit weights."""
    more = ("--lora_base_model", "text_encoder", "--lora_target_modules", "language_model.layers.0.self_attn.q_proj")
    outcome = train("out", *NARROW, *more, "--max_steps", 2, "--remove_prefix_in_ckpt", "")
    assert outcome.code == 0, outcome.err
    ups = [tensor for name, tensor in lora_of(tmp_path / "out").items() if ".lora_B." in name]
    assert ups and all(up.abs().max() > 0 for up in ups)
