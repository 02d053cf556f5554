"""No process that shards a model ever holds the whole of it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.models.registry import load_family
from diffsynth_core.weights.writing import LazyStateDict
from tests.conftest import PLACES
from tests.runs.engines import ENGINES

HEADS, BLOCKS = 180, 2
"""Of a transformer of 2.4 GB in float32. Its matrices are about as large as those of real models."""
TRANSFORMER = "Qwen/Qwen-Image/transformer"


def widen(base: Path) -> None:
    """Replace the tiny transformer by one of zeros in bfloat16."""
    file = base / TRANSFORMER / "config.json"
    config = json.loads(file.read_text()) | {"num_attention_heads": HEADS, "num_layers": BLOCKS}
    file.write_text(json.dumps(config))
    with torch.device("meta"):
        module = load_family("qwen-image").build("dit", config)
    makers = {
        name: partial(torch.zeros, tensor.shape, dtype=torch.bfloat16) for name, tensor in module.state_dict().items()
    }
    for former in (base / TRANSFORMER).glob("diffusion_pytorch_model*"):
        former.unlink()
    write_tensors(base / TRANSFORMER / "diffusion_pytorch_model.safetensors", LazyStateDict(makers), {})


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Model base paths: with a tiny transformer, and with a large one."""
    bases = {name: tmp_path_factory.mktemp(name) for name in ("tiny", "large")}
    for base in bases.values():
        for component, place in PLACES.items():
            load_family("qwen-image").write_tiny_weights(base, component, "Qwen/Qwen-Image", place)
    widen(bases["large"])
    return bases


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2 offload", "zero3"])
def test_a_process_holds_its_share_and_one_tensor(bases, photographs, tmp_path, engine):
    found = {}
    for name, base in bases.items():
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        output = tmp_path / name
        process = subprocess.run(
            [sys.executable, *launcher, "-m", "tests.runs.shard_memory", str(base), str(photographs), str(output)],
            env=os.environ | ENGINES[engine] | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert process.returncode == 0, process.stderr
        found[name] = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    for tiny, large in zip(found["tiny"], found["large"], strict=True):
        share, largest = large["model"] / 2, large["largest"]
        loading = large["loading"] - tiny["loading"]
        saving = large["saving"] - large["before saving"]
        print(f"{engine}, rank {large['rank']}: loading {loading / 1e9:.2f} GB of {(share + largest) / 1e9:.2f}")
        print(f"{engine}, rank {large['rank']}: saving {saving / 1e9:.2f} GB more, largest tensor {largest / 1e9:.2f}")
        assert loading < 1.1 * (share + largest)
        assert saving < largest + 0.1 * (share + largest)
