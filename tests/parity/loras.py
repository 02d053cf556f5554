"""LoRA files of real runs: trained, loaded by diffusers' pipelines and by us, and compared."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.adapters.lora import LoraWeights, add_lora, load_lora
from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from diffsynth_core.weights.key_maps import KeyMap
from diffsynth_core.weights.lora_formats import LoraNaming
from tests.loras import RANK


def train_file(base: Path, output: Path, lora_format: str, flags: Mapping[str, str]) -> Path:
    """Train a LoRA of the transformer for an epoch with these and further parameters; return its file."""
    common = {
        "lora_base_model": "dit",
        "lora_rank": str(RANK),
        "lora_format": lora_format,
        "remove_prefix_in_ckpt": "pipe.dit.",
        "num_epochs": "1",
        "output_path": str(output),
    }
    train(make_plan(resolve({**common, **flags}), SilentReporter(), base=base), SilentReporter(), StopRequest())
    return output / "epoch-0.safetensors"


def load_into(pipeline: Any, path: Path, **settings: Any) -> None:
    """Load a file as a pipeline does."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="trained", **settings)


def adapter_modules(transformer: Any) -> dict[str, Any]:
    """Return the modules of a diffusers transformer with a LoRA, by name."""
    return {name: module for name, module in transformer.named_modules() if len(getattr(module, "lora_A", ()))}


def with_lora(transformer: Any, path: Path, modules: Collection[str], naming: LoraNaming, public_keys: KeyMap) -> Any:
    """Return a transformer with a LoRA file on documented modules, loaded by us."""
    add_lora(transformer, sorted(modules), RANK, seed=0, public_keys=public_keys)
    filled = load_lora(transformer, path, naming, public_keys)
    assert filled == len(modules), (filled, len(modules))
    return transformer


def check_outputs(what: str, loaded: Tensor, ours: Tensor, base: Tensor, scale: float = 1.0) -> None:
    """Check that a transformer loaded by diffusers gives our output with a LoRA, and another one without."""
    off, moved = (float((loaded - other).abs().max()) for other in (ours, base))
    told = f"{what}: off by {off:.1e}, moved by {moved:.1e}, at a scale of {scale:.1f}"
    print(told)
    assert off < 1e-5 * scale, told
    assert moved > 1e-2 * scale, f"the LoRA does something: {told}"


def check_same_weights(found: Sequence[Mapping[str, LoraWeights]], modules: Collection[str]) -> None:
    """Check that all files contain the same weights for all modules."""
    first, *others = found
    assert first.keys() == set(modules), sorted(first.keys() ^ set(modules))
    assert all(weights.B.any() for weights in first.values()), "every module has learned"
    for other in others:
        assert other.keys() == first.keys(), sorted(other.keys() ^ first.keys())
        for module in modules:
            assert torch.equal(first[module].A, other[module].A), module
            assert torch.equal(first[module].B, other[module].B), module
