"""Real runs on tiny weights: what they write, and that they go on where they stopped."""

import json
from pathlib import Path

from safetensors.torch import load_file

RECIPE = ("--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--dataset_repeat", 2, "--num_epochs", 1)


def test_a_lora_run_writes_what_it_promises(cli, photographs):
    outcome = cli("train", *RECIPE, "--dataset_base_path", photographs, "--output_path", "out", "--save_steps", 5)
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["status"] == "completed"
    assert [entry["file"] for entry in record["checkpoints"]] == ["step-5.safetensors", "step-8.safetensors"]
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 8
    assert "transformer_blocks.0.attn.to_q.lora_A.default.weight" in load_file("out/step-8.safetensors")
