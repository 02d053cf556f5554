"""LoRA: y = W x + (alpha / rank) B A x, with A `[rank, in]`, B `[out, rank]` (Hu et al. 2021, arXiv:2106.09685).

alpha equals rank, so the scale is 1. A starts uniform in ±1/sqrt(in), B at zero; both are kept in float32.

A public module may be several modules here with the same input: q, k and v, whose rows are one matrix in the original.
It still has one LoRA. Each of them has its rows of B, and all of them share A, which therefore gets the sum of their
gradients, as in `[Bq; Bk; Bv] A`.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.deltas import WeightDelta, module_delta
from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.adapters.tensors import Place, Whole, as_is, place
from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.progress import pluralize
from diffsynth_core.randomness import key_of
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap
from diffsynth_core.weights.lora import joint_rank
from diffsynth_core.weights.lora_files import read_lora_file
from diffsynth_core.weights.lora_formats import DIT, LoraNaming, lora_keys

ADAPTER = "default"


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA of one public module in training: A `[rank, in, …]` and B `[out, rank, …]`."""

    A: Tensor
    B: Tensor


def add_lora(
    model: nn.Module,
    modules: Sequence[str],
    rank: int | Mapping[str, int],
    seed: int,
    public_keys: KeyMap = SAME_NAMES,
) -> None:
    """Put a fresh LoRA on modules of a model; only the LoRA and what took gradients before take gradients.

    On a model on the meta device the LoRA is too, until `start_lora`.

    Args:
        modules: public names.
        rank: of all, or of each of them.
        public_keys: public names -> names in the model.

    Raises:
        DiffSynthError: when a module is not there or is of a kind that peft has no LoRA for.
    """
    with _without_bitsandbytes():
        from peft import LoraConfig, inject_adapter_in_model

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own_names = {module: public_keys.to_targets(module) or () for module in modules}
    targets = [own for names in own_names.values() for own in names]
    most = rank if isinstance(rank, int) else max(rank.values())
    lower = {} if isinstance(rank, int) else {name: one for name, one in rank.items() if one != most}
    # peft matches a pattern with the end of a module's name; `^` makes it the whole name.
    patterns = {f"^{re.escape(own)}": one for name, one in lower.items() for own in own_names[name]}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules="|".join(map(re.escape, targets)),
        lora_dropout=0.0,
    )
    device = next(model.parameters()).device
    try:
        # On the meta device, so that peft neither initializes the LoRA nor gives it the dtype of the base.
        with _without_bitsandbytes():
            inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise DiffSynthError(
            f"cannot add a LoRA to these modules: {error}",
            "choose linear or convolution modules in `--lora_target_modules`",
        ) from error
    layers = lora_layers(model)
    if layers.keys() != set(targets):
        missing = sorted(set(targets) - layers.keys())
        raise DiffSynthError(
            f"{len(missing)} of {len(targets)} LoRA target modules do not exist: {list_names(missing)}",
            "choose modules of the model in `--lora_target_modules`",
        )
    for first, *others in own_names.values():
        for other in others:
            # The same module in all of them, not a copy: autograd then sums the gradients of A, and optimizers see it
            # once.
            layers[other].lora_A[ADAPTER] = layers[first].lora_A[ADAPTER]
    for name, parameter in model.named_parameters():
        # peft freezes everything that is not LoRA; what was to be trained in full still is.
        parameter.requires_grad_(".lora_" in name or name.replace(".base_layer.", ".") in trained)
    if device.type != "meta":
        start_lora(model, seed, public_keys, device)


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes count as not installed while peft is imported and used: it would import it for layers of its
    own, which no model here has, and that takes as long as importing torch.
    """
    loaded = "bitsandbytes" in sys.modules
    if not loaded:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not loaded:
            del sys.modules["bitsandbytes"]


def start_lora(
    model: nn.Module,
    seed: int,
    public_keys: KeyMap = SAME_NAMES,
    device: torch.device | None = None,
    place: Place = place,
) -> None:
    """Give the LoRA of a model its initial weights, in float32 on this device (the CPU if there is none).

    Those of a module depend only on the seed and its public name.
    """
    layers = lora_layers(model)
    for module in public_keys.to_sources(layers):
        names = public_keys.to_targets(module) or ()
        shape = layers[names[0]].lora_A[ADAPTER].weight.shape
        bound = math.prod(shape[1:]) ** -0.5
        generator = torch.Generator().manual_seed(key_of("lora", seed, module))
        a = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        place(model, f"{names[0]}.lora_A.{ADAPTER}.weight", a.to(device))
        for name in names:
            b = torch.zeros(layers[name].lora_B[ADAPTER].weight.shape, device=device)
            place(model, f"{name}.lora_B.{ADAPTER}.weight", b)


def base_layers(model: nn.Module) -> dict[str, str]:
    """The names of a model's modules without LoRA -> their names now: a layer with a LoRA is `<name>.base_layer`."""
    # A layer with a LoRA comes before its base layer, which takes its place here.
    return {name.removesuffix(".base_layer"): name for name, _ in model.named_modules()}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The modules that carry a LoRA (layers of peft), by their name in the model."""
    return {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())}


def lora_weights(model: nn.Module, public_keys: KeyMap = SAME_NAMES, whole: Whole = as_is) -> dict[str, LoraWeights]:
    """The LoRA of every module that has one, by its public name.

    `whole` is applied to each matrix of the model.
    """
    return {
        module: LoraWeights(
            whole(a), public_keys.fuse(f"{module}.weight", {name: whole(part) for name, part in parts.items()})
        )
        for module, (a, parts) in _matrices(model, public_keys).items()
    }


def _matrices(model: nn.Module, public_keys: KeyMap) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """A and B as the model holds them, by public module; B by the names of the weights that its parts change."""
    layers = lora_layers(model)
    found = {}
    for module in public_keys.to_sources(layers):
        own = public_keys.to_targets(module) or ()
        parts = {f"{name}.weight": layers[name].lora_B[ADAPTER].weight for name in own}
        found[module] = (layers[own[0]].lora_A[ADAPTER].weight, parts)
    return found


def name_lora(
    weights: Mapping[str, LoraWeights], lora_format: LoraFormat, naming: LoraNaming = DIT
) -> dict[str, Tensor]:
    """LoRA weights, given by public module, under the keys of a format.

    If the format has separate parts of a module, each gets its rows of B and the whole of A.
    """
    tensors: dict[str, Tensor] = {}
    names = naming.vocabulary(lora_format).names
    for module, lora in weights.items():
        parts = names.split(f"{module}.weight", lora.B.detach())
        for keys, b in zip(lora_keys(module, lora_format, naming), parts.values(), strict=True):
            assert keys.A and keys.B
            tensors[keys.A], tensors[keys.B] = lora.A.detach(), b
            if keys.alpha:
                tensors[keys.alpha] = torch.tensor(float(lora.A.shape[0]))
    return tensors


def load_lora(
    model: nn.Module,
    path: Path,
    naming: LoraNaming = DIT,
    public_keys: KeyMap = SAME_NAMES,
    place: Place = place,
    whole: Whole = as_is,
) -> int:
    """Initialize the LoRA of a model from a file of any format; returns how many public modules it filled.

    Modules that the file leaves out keep their initialization; those of the file without a LoRA here (they never get a
    gradient) are skipped. If the file has separate LoRAs of q, k and v, and the model one of all, it gets their joint
    rank, with B block-diagonal. If the model has a higher rank, the further rows of A keep their initialization, with
    columns of zeros in B: the change of the weight is the same.

    Args:
        place: sets each matrix.
        whole: returns a matrix of the model whole, if `place` keeps a part of it.

    Raises:
        DiffSynthError: as `read_lora_file`; also when the model has a lower rank, or no module of it is filled.
    """
    from safetensors import safe_open

    targets = _matrices(model, public_keys)
    lora = read_lora_file(path, _weight_shapes(model, public_keys), naming)
    filled = targets.keys() & lora.modules.keys()
    ranks = {module: joint_rank(lora.modules[module]) for module in sorted(filled)}
    with safe_open(path, framework="pt", device="cpu") as stream, torch.no_grad():
        for module, rank in ranks.items():
            a, parts = targets[module]
            a, parts = whole(a), {name: whole(part) for name, part in parts.items()}
            if rank > a.shape[0]:
                raise DiffSynthError(
                    f"`{path}` has rank {rank} at `{module}`, but the run uses rank {a.shape[0]}",
                    f"pass `--lora_rank {max(ranks.values())}`",
                )
            delta = module_delta(lora.modules[module], stream)
            for name, matrix in _filled(a, parts, delta, module, public_keys).items():
                place(model, name, matrix)
    if not filled:
        raise DiffSynthError(
            f"`{path}` has no LoRA for the {pluralize(len(targets), 'trained module')}",
            "use a LoRA of these modules, or change `--lora_target_modules`",
        )
    return len(filled)


@torch.no_grad()
def set_lora(model: nn.Module, deltas: Mapping[str, WeightDelta], public_keys: KeyMap = SAME_NAMES) -> None:
    """Set the LoRA of a model so that it changes each weight by a product B A; differences are not looked at.

    Modules without a delta change nothing. Unused rows of A and columns of B are 0.

    Args:
        deltas: by public module; of at most the rank of the module's LoRA.
    """
    for module, (a, parts) in _matrices(model, public_keys).items():
        for matrix in (a, *parts.values()):
            matrix.zero_()
        if delta := deltas.get(module):
            for name, filled in _filled(a, parts, delta, module, public_keys).items():
                model.get_parameter(name).copy_(filled)


def _filled(
    a: Tensor, parts: Mapping[str, Tensor], delta: WeightDelta, module: str, public_keys: KeyMap
) -> dict[str, Tensor]:
    """Return A and B of a public module, by parameter name: their first rows and columns are a delta, the other rows
    those of `a`, and the other columns 0.
    """
    rank = delta.rank
    first = (public_keys.to_targets(module) or ())[0]
    filled = {f"{first}.lora_A.{ADAPTER}.weight": torch.cat([delta.A.reshape(rank, *a.shape[1:]).to(a), a[rank:]])}
    kernel = next(iter(parts.values())).shape[2:]
    b = delta.B.reshape(len(delta.B), rank, *kernel)
    for name, rows in public_keys.split(f"{module}.weight", b).items():
        columns = torch.zeros(parts[name].shape, dtype=a.dtype, device=a.device)
        columns[:, :rank] = rows.reshape(len(rows), rank, *kernel)
        filled[f"{name.removesuffix('weight')}lora_B.{ADAPTER}.weight"] = columns
    return filled


def _weight_shape(module: Any) -> tuple[int, ...]:
    """Return the shape of a module's weight, which is not widened for it, nor gathered if it is a part of that."""
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)


def _weight_shapes(model: nn.Module, public_keys: KeyMap) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a model's modules, by their public names, without peft's layers in between."""
    own = {
        f"{name.removesuffix('.base_layer')}.weight": _weight_shape(module)
        for name, module in model.named_modules()
        if ".lora_" not in name
        and (isinstance(module, StoredLinear) or isinstance(getattr(module, "weight", None), Tensor))
    }
    return {
        name.removesuffix(".weight"): public_keys.fuse_shape(name, own)
        for name in public_keys.to_sources(own)
        if name.endswith(".weight")
    }
