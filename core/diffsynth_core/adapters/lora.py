"""LoRA: y = W x + (alpha / rank) B A x, with A `[rank, in]`, B `[out, rank]` (Hu et al. 2021, arXiv:2106.09685).

alpha equals rank, so the scale is 1. A starts uniform in ±1/sqrt(in), B at zero; both are kept in float32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.randomness import key_of
from diffsynth_core.state_dicts.headers import read_header
from diffsynth_core.state_dicts.key_maps import SAME_NAMES, KeyMap
from diffsynth_core.state_dicts.lora_files import check_lora_file
from diffsynth_core.state_dicts.lora_names import DIT, LoraNaming, find_lora_keys, lora_keys

ADAPTER = "default"


@dataclass(frozen=True)
class LoraWeights:
    """The two halves of one module's LoRA: down is A `[rank, in]`, up is B `[out, rank]`."""

    down: Tensor
    up: Tensor


def add_lora(model: nn.Module, modules: Sequence[str], rank: int, seed: int, documented: KeyMap = SAME_NAMES) -> None:
    """Put a fresh LoRA on the named modules of a model; only the LoRA takes gradients.

    The initial weights of a module depend on the seed and its documented name alone.

    Args:
        modules: names in the model.
        documented: documented names -> names in the model.

    Raises:
        DiffSynthError: when a module is not there or is of a kind that peft has no LoRA for.
    """
    from peft import LoraConfig, inject_adapter_in_model

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, modules)), lora_dropout=0.0)
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise DiffSynthError(
            f"LoRA cannot be put on these modules: {error}",
            "name linear or convolution modules in `--lora_target_modules`",
        ) from error
    layers = lora_layers(model)
    if layers.keys() != set(modules):
        missing = sorted(set(modules) - layers.keys())
        raise DiffSynthError(
            f"LoRA did not find {len(missing)} of {len(modules)} modules: {shorten(missing)}",
            "name modules that are there",
        )
    for name, layer in layers.items():
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # type: ignore[index]
        assert isinstance(down, nn.Module) and isinstance(up, nn.Module)
        down.to(torch.float32)
        up.to(torch.float32)
        _start(down.weight, up.weight, seed, _documented(documented, name))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        # peft freezes everything that is not LoRA; what was to be trained in full still is.
        parameter.requires_grad_(".lora_" in name or name.replace(".base_layer.", ".") in trained)


def _start(down: nn.Parameter, up: nn.Parameter, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(key_of("lora", seed, name))
    bound = down[0].numel() ** -0.5
    with torch.no_grad():
        down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
        up.zero_()


def _documented(names: KeyMap, module: str) -> str:
    documented = names.theirs(module)
    assert documented is not None  # planning found the module by that name
    return documented


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry a LoRA, by their name in the model."""
    return {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())}


def lora_weights(model: nn.Module, documented: KeyMap = SAME_NAMES) -> dict[str, LoraWeights]:
    """The LoRA of every module that carries one, by its documented name."""
    return {
        _documented(documented, name): LoraWeights(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)  # type: ignore[index, union-attr]
        for name, layer in lora_layers(model).items()
    }


def name_lora(weights: Mapping[str, LoraWeights], dialect: str, naming: LoraNaming = DIT) -> dict[str, Tensor]:
    """LoRA weights, given by documented module, under the keys of a dialect."""
    tensors: dict[str, Tensor] = {}
    for module, halves in weights.items():
        keys = lora_keys(module, dialect, naming)
        assert keys.down and keys.up
        tensors[keys.down], tensors[keys.up] = halves.down, halves.up
        if keys.alpha:
            tensors[keys.alpha] = torch.tensor(float(halves.down.shape[0]))
    return tensors


def load_lora(model: nn.Module, path: Path, naming: LoraNaming = DIT, documented: KeyMap = SAME_NAMES) -> int:
    """Start the LoRA of a model from a file in any dialect; returns how many modules it filled.

    Modules of the model that the file leaves out keep their fresh start; modules of the file that carry no LoRA here
    (those that never get a gradient) are passed over.

    Raises:
        DiffSynthError: as `check_lora_file`; also when ranks differ, or no module of the model is filled.
    """
    from safetensors import safe_open

    targets = lora_weights(model, documented)
    shapes = _weight_shapes(model, documented)
    ranks = check_lora_file(path, shapes, naming)
    _, found, _ = find_lora_keys(read_header(path).tensors, shapes, naming)
    filled = 0
    with safe_open(path, framework="pt", device="cpu") as stream, torch.no_grad():
        for module, halves in targets.items():
            if module not in found:
                continue
            if ranks[module] != halves.down.shape[0]:
                raise DiffSynthError(
                    f"`{path}` has rank {ranks[module]} at `{module}`, the run has {halves.down.shape[0]}",
                    f"give `--lora_rank {ranks[module]}`",
                )
            keys = found[module]
            scale = float(stream.get_tensor(keys.alpha)) / ranks[module] if keys.alpha else 1.0
            halves.down.copy_(stream.get_tensor(keys.down))
            halves.up.copy_(stream.get_tensor(keys.up).float() * scale)
            filled += 1
    if not filled:
        raise DiffSynthError(
            f"`{path}` has a LoRA for none of the {len(targets)} modules that train",
            "name a LoRA of these modules, or other `--lora_target_modules`",
        )
    return filled


def _weight_shapes(model: nn.Module, documented: KeyMap) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a model's modules, by their documented names, without peft's layers in between."""
    shapes = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        own_name = name.removesuffix(".base_layer")
        known = documented.theirs(own_name)
        if isinstance(weight, Tensor) and ".lora_" not in name and known and documented.ours(known) == (own_name,):
            shapes[known] = tuple(weight.shape)
    return shapes
