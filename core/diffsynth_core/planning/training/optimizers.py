"""Table of the optimizers: how each is created, and what it takes in memory. Creating one imports torch.

Each is created with the learning rate of the run, which its groups get before every step, and with the options that
planning/training/optimizer_choice.py makes of the parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffsynth_core.planning.packages import Package
from diffsynth_core.planning.training.optimizer_options import (
    BETA,
    NOT_NEGATIVE,
    SWITCH,
    Option,
    Options,
    choice,
    integer,
    number,
    or_none,
    several,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Shape = tuple[int, ...]
Build = Callable[[float, Options, Iterable["nn.Parameter"]], "Optimizer"]
"""Creates an optimizer of trained parameters, from learning rate and options."""
StateBytes = Callable[[Shape, Options], int]
"""Bytes of the state of a trained tensor."""
UpdateBytes = Callable[[Shape, Options, str], int]
"""Bytes for a trained tensor while the step works; device: cpu, or cuda for all accelerators."""

FLOAT32 = 4
BLOCK = 256
"""Numbers that share a scale in the 8-bit state of bitsandbytes (`blocksize` in bitsandbytes/optim/optimizer.py)."""
MIN_8BIT = 4096
"""Smaller tensors keep a float32 state (`min_8bit_size` of bitsandbytes)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer, and what it takes.

    Attributes:
        title: its name in texts.
        options: its arguments: name -> what it accepts.
        parameters: parameter of the run -> the option that gets its value, unless the option is set itself.
        state_bytes: of its state, in memory and in the saved state of a run, without counters.
        update_bytes: of what its step works with beside that, without temporaries of a single tensor.
        elementwise: whether each number is updated from its own history alone, so that a part of a tensor is updated
            as it would be in the whole.
        by_tensor: whether each tensor may have an optimizer of its own, since none depends on the others.
        package: what must be installed for it.
        low_rate: learning rate below which the run gets a warning, because the optimizer multiplies it by a step size
            of its own; and why.
        takes_rate_as_is: whether it does not, with these options.
    """

    title: str
    build: Build
    state_bytes: StateBytes
    update_bytes: UpdateBytes
    options: Mapping[str, Option] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    elementwise: bool = False
    by_tensor: bool = True
    package: Package | None = None
    low_rate: tuple[float, str] | None = None
    takes_rate_as_is: Callable[[Options], bool] = lambda options: False


BITSANDBYTES = Package("bitsandbytes", "bitsandbytes", "bitsandbytes")
PYTORCH_OPTIMIZER = Package("pytorch-optimizer", "pytorch_optimizer", "pytorch-optimizer")
DECAY = {"weight_decay": "weight_decay"}
ADAM = {**DECAY, "adam_betas": "betas"}
"""Parameters that an optimizer like Adam takes."""


def per_number(count: int) -> StateBytes:
    """Return the state of so many bytes per number."""
    return lambda shape, options: count * math.prod(shape)


def no_update(shape: Shape, options: Options, device: str) -> int:
    """Return the bytes of a step that goes from tensor to tensor."""
    return 0


def on_accelerators(count: int) -> UpdateBytes:
    """Return a step that works on all tensors at once where there is an accelerator: so many bytes per number."""
    return lambda shape, options, device: 0 if device == "cpu" else count * math.prod(shape)


def _factors(shape: Shape) -> int:
    """Return the bytes of row and column averages of a tensor of two dimensions or more, over its last two."""
    return FLOAT32 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _adamw(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from torch.optim import AdamW

    return AdamW(trained, lr=rate, **options)


def _adamw_state(shape: Shape, options: Options) -> int:
    return (3 if options.get("amsgrad") else 2) * FLOAT32 * math.prod(shape)


def _adamw_update(shape: Shape, options: Options, device: str) -> int:
    # On accelerators the default step takes the roots of all second moments at once, on the CPU those of one tensor
    # (torch/optim/adam.py, `_multi_tensor_adam`); the fused one needs no memory.
    return 0 if options.get("fused") else on_accelerators(FLOAT32)(shape, options, device)


def _adamw8bit(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from diffsynth_core.optimizers.adamw8bit import AdamW8bit

    optimizer: Optimizer = AdamW8bit(trained, lr=rate, **options)
    return optimizer


def _adamw8bit_state(shape: Shape, options: Options) -> int:
    numbers = math.prod(shape)
    if numbers < options.get("min_8bit_size", MIN_8BIT):
        return 2 * FLOAT32 * numbers
    return 2 * (numbers + FLOAT32 * -(-numbers // BLOCK))


def _adafactor(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from torch.optim import Adafactor

    return Adafactor(trained, lr=rate, **options)


def _adafactor_state(shape: Shape, options: Options) -> int:
    return _factors(shape) if len(shape) > 1 else FLOAT32 * math.prod(shape)


def _muon(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from diffsynth_core.optimizers.muon import MuonWithAdamW

    # The scale by which the learning rate and weight decay of AdamW hold for matrices too (arXiv:2502.16982).
    muon = {"adjust_lr_fn": "match_rms_adamw"} | {name: options[name] for name in MUON_ONLY if name in options}
    adamw = {name: options[name] for name in ("betas", "eps") if name in options}
    return MuonWithAdamW(trained, muon, adamw, lr=rate, weight_decay=options["weight_decay"])


def _muon_state(shape: Shape, options: Options) -> int:
    return (1 if len(shape) == 2 else 2) * FLOAT32 * math.prod(shape)


def _muon_update(shape: Shape, options: Options, device: str) -> int:
    return 0 if len(shape) == 2 else _adamw_update(shape, options, device)


def _lion(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from pytorch_optimizer import Lion

    optimizer: Optimizer = Lion(trained, lr=rate, **options)
    return optimizer


def _prodigy(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from pytorch_optimizer import Prodigy

    optimizer: Optimizer = Prodigy(trained, lr=rate, **options)
    return optimizer


def _came(rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from pytorch_optimizer import CAME

    optimizer: Optimizer = CAME(trained, lr=rate, **options)
    return optimizer


def _came_state(shape: Shape, options: Options) -> int:
    moment = FLOAT32 * math.prod(shape)
    return moment + (2 * _factors(shape) if len(shape) > 1 else moment)


MUON_ONLY: dict[str, Option] = {
    "momentum": BETA,
    "nesterov": SWITCH,
    "ns_steps": integer(1, 100),
    "adjust_lr_fn": choice("original", "match_rms_adamw"),
}
"""Options of Muon that AdamW, which updates what is no matrix, does not have."""
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(
        title="AdamW",
        build=_adamw,
        state_bytes=_adamw_state,
        update_bytes=_adamw_update,
        options={
            "betas": several(2, BETA),
            "eps": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "amsgrad": SWITCH,
            "fused": SWITCH,
        },
        parameters=ADAM,
        elementwise=True,
    ),
    "adamw8bit": OptimizerSpec(
        title="AdamW 8-bit",
        build=_adamw8bit,
        state_bytes=_adamw8bit_state,
        update_bytes=no_update,
        options={
            "betas": several(2, BETA),
            "eps": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "min_8bit_size": integer(0, 2**31),
        },
        parameters=ADAM,
        package=BITSANDBYTES,
    ),
    "adafactor": OptimizerSpec(
        title="Adafactor",
        build=_adafactor,
        state_bytes=_adafactor_state,
        update_bytes=no_update,  # goes from tensor to tensor unless `foreach` is set
        options={
            "beta2_decay": Option("a number of at most 0", lambda text: -NOT_NEGATIVE.read(str(-float(text)))),
            "eps": several(2, or_none(NOT_NEGATIVE)),
            "d": number(at_least=1),
            "weight_decay": NOT_NEGATIVE,
        },
        parameters=DECAY,
        # It multiplies by the larger of `eps[1]` and the root mean square of the weights, which is below 1.
        takes_rate_as_is=lambda options: (options.get("eps") or (None, 0))[1] == 1,
        low_rate=(1e-3, "adafactor multiplies it by the size of the weights, at least 0.001; 0.01 is usual"),
    ),
    "came": OptimizerSpec(
        title="CAME",
        build=_came,
        state_bytes=_came_state,
        update_bytes=lambda shape, options, device: 2 * FLOAT32 * math.prod(shape),  # updates and residuals of all
        options={
            "betas": several(3, BETA),
            "weight_decay": NOT_NEGATIVE,
            "clip_threshold": number(above=0),
            "eps1": NOT_NEGATIVE,
            "eps2": NOT_NEGATIVE,
        },
        parameters=DECAY,
        package=PYTORCH_OPTIMIZER,
    ),
    "lion": OptimizerSpec(
        title="Lion",
        build=_lion,
        state_bytes=per_number(FLOAT32),
        update_bytes=lambda shape, options, device: FLOAT32 * math.prod(shape),  # the updates of all tensors at once
        options={"betas": several(2, BETA), "weight_decay": NOT_NEGATIVE},
        parameters=DECAY,
        elementwise=True,
        package=PYTORCH_OPTIMIZER,
    ),
    "muon": OptimizerSpec(
        title="Muon",
        build=_muon,
        state_bytes=_muon_state,
        update_bytes=_muon_update,
        options={**MUON_ONLY, "betas": several(2, BETA), "eps": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE},
        parameters=ADAM,
    ),
    "prodigy": OptimizerSpec(
        title="Prodigy",
        build=_prodigy,
        state_bytes=per_number(4 * FLOAT32),  # two moments, the weights at the start, and the sum that measures the way
        update_bytes=on_accelerators(FLOAT32),
        options={
            "betas": several(2, BETA),
            "beta3": or_none(BETA),
            "d0": number(above=0),
            "d_coef": number(above=0),
            "growth_rate": number(at_least=1),
            "eps": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "bias_correction": SWITCH,
            "safeguard_warmup": SWITCH,
        },
        parameters=ADAM,
        by_tensor=False,
        package=PYTORCH_OPTIMIZER,
        low_rate=(0.1, "prodigy multiplies it by the step size that it finds; 1 is usual"),
    ),
}
"""Name -> optimizer. Prodigy, Lion and CAME come from pytorch-optimizer rather than from the packages of their authors,
which are not kept up: came-pytorch 0.1.3 is of 2024-02, prodigyopt 1.1.2 of 2025-01 and prints to stdout."""
