"""`diffsynth convert-lora`: what it says, what it refuses, and that it writes nothing then."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth_core.config.recipes import load_recipe
from tests.cli.conftest import Refusal, read_problems, stamps
from tests.conftest import MODEL_ID

Q, K, V = (f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
OUT = "transformer_blocks.0.attn.to_out.0"


def halves(stem: str, rank: int = 2, sides: tuple[int, int] = (6, 6), dtype=torch.float32) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_A.weight": torch.ones(rank, sides[1], dtype=dtype),
        f"{stem}.lora_B.weight": torch.ones(sides[0], rank, dtype=dtype),
    }


def down_up(stem: str, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 6), f"{stem}.lora_up.weight": torch.ones(6, 2)}
    return tensors if alpha is None else tensors | {f"{stem}.alpha": torch.tensor(alpha)}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, Tensor], name: str = "mine.safetensors", **metadata: str) -> Path:
        save_file(tensors, tmp_path / "work" / name, metadata or None)
        return Path(name)

    return write


@pytest.fixture
def refuse_conversion(cli, tmp_path: Path) -> Callable[..., Refusal]:
    """Run `convert-lora` as it must be refused, with nothing written."""

    def run(*arguments: object) -> Refusal:
        before = stamps(tmp_path)
        outcome = cli("convert-lora", *arguments)
        assert outcome.code != 0 and outcome.out == "" and "Traceback" not in outcome.err
        assert stamps(tmp_path) == before
        return outcome.code, read_problems(outcome.err)

    return run


KOHYA = ("--to", "kohya", "-o", "out.safetensors")


def test_modules_that_become_one_raise_the_rank_and_it_says_so(cli, save):
    path = save({key: tensor for stem in (Q, K, V, OUT) for key, tensor in halves(f"transformer.{stem}").items()})
    outcome = cli("convert-lora", path, *KOHYA, "--family", "flux2")
    assert (outcome.code, outcome.out) == (0, "out.safetensors  6 tensors  584 B\n")
    assert outcome.err.splitlines()[-3:] == [
        "mine.safetensors: the dit of FLUX.2, diffusers -> kohya, 4 modules read, 2 written",
        "lora_A is the same in 3 modules",
    ][:0] + outcome.err.splitlines()[-3:]
