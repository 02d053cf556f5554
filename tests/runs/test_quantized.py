"""Runs with quantized frozen weights: the plan, the record, resuming, encodings, and drawing."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ENTRIES

RECIPE = ("--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--dataset_repeat", 2, "--num_epochs", 1)
OPTIONS = f"{ENTRIES['dit']}:bitsandbytes_nf4/img_mod.1,txt_mod.1;{ENTRIES['text_encoder']}:int8"
QUANTIZED = ("--quant_options", OPTIONS)


@pytest.fixture
def train(cli, photographs, tmp_path):
    def run(name: str, *more: object):
        flags = ("--output_path", tmp_path / name, "--cache_path", tmp_path / "cache", "--learning_rate", 0.01)
        return cli("train", *RECIPE, "--dataset_base_path", photographs, *flags, *more)

    return run


def test_the_plan_and_the_record_say_what_is_quantized(train, tmp_path):
    outcome = train("out", *QUANTIZED, "--dry-run", "-v")
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.startswith("  ")}
    assert "% of its weights stored in nf4 and LoRA of rank 32" in lines["dit"]
    assert lines["text_encoder"].endswith("% of its weights stored in int8")
    assert train("out", *QUANTIZED, "--max_steps", 2).code == 0
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["quantized_components"] == {"dit": "nf4/img_mod.1,txt_mod.1", "text_encoder": "int8"}
    assert record["float8_components"] == [] and record["parameters"]["quant_options"] == OPTIONS
    other = f"{ENTRIES['dit']}:fp8"
    refused = train("out", "--quant_options", other, "--resume", "auto")
    assert refused.code == 2
    quantized = "dit to nf4 but for img_mod.1, txt_mod.1 and text_encoder to int8"
    assert f"`quant_options` quantized {quantized} in the run in" in refused.err
    assert "now dit to fp8" in refused.err


def test_a_stopped_run_goes_on_to_the_same_bits_and_draws(train, cli, tmp_path):
    assert train("through", *QUANTIZED, "--max_steps", 4).code == 0
    assert train("pieces", *QUANTIZED, "--max_steps", 2).code == 0
    path = tmp_path / "pieces/run.json"
    record = json.loads(path.read_text())
    assert train("pieces", *QUANTIZED, "--resume", "auto", "--max_steps", 4).code == 0
    through, pieces = (
        load_file(sorted((tmp_path / name).glob("*-*.safetensors"))[-1]) for name in ("through", "pieces")
    )
    assert through.keys() == pieces.keys()
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in through.items())
    assert all(tensor.abs().max() > 0 for name, tensor in through.items() if ".lora_B." in name)
    # The record of an older run, which quantized nothing, has no such field.
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "quantized_components"}))
    refused = train("pieces", *QUANTIZED, "--resume", "auto")
    assert refused.code == 2 and "quantized nothing in the run in" in refused.err
    drawn = cli("generate", "--recipe", "qwen-image-lora", *QUANTIZED, "--prompt", "a cat", "--out", "drawn",
                "--steps", 1, "--width", 32, "--height", 32, "--device", "cpu")  # fmt: skip
    assert drawn.code == 0, drawn.err


def test_encodings_of_quantized_encoders_are_not_taken_for_others(train):
    assert train("wide", "--max_steps", 1).code == 0
    same = train("dit", "--quant_options", f"{ENTRIES['dit']}:int8", "--max_steps", 1)
    assert same.code == 0 and "Loading text_encoder" not in same.err
    other = train("text", *QUANTIZED, "--max_steps", 1)
    assert other.code == 0 and "Loading text_encoder" in other.err and "Loading vae" not in other.err
