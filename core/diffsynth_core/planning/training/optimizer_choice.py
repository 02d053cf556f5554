"""The optimizer that the parameters name, with its options. Imports nothing but a class that they name by its path."""

import importlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from diffsynth_core.config.optimizer_args import split_arguments
from diffsynth_core.config.origins import Origin
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, report, report_missing, suggest, truncate
from diffsynth_core.planning.packages import missing_package
from diffsynth_core.planning.training.optimizer_options import Option, Options, read_any
from diffsynth_core.planning.training.optimizers import (
    DECAY,
    FLOAT32,
    OPTIMIZERS,
    OptimizerSpec,
    on_accelerators,
    per_number,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

SET_BY_THE_LOOP = {"lr": "learning_rate"}
"""Option that no argument sets -> the parameter that does."""
FUSED = "fused"
"""Option of optimizers of torch."""
SET_BY_PARAMETERS = ("weight_decay", "adam_betas")
"""Parameters that are options of optimizers."""


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer and its options.

    Attributes:
        name: in the table of optimizers (planning/training/optimizers.py), or the dotted path of a class.
        ema_decay: that of the average of the weights which is kept beside its state; None: no average.
    """

    name: str = "adamw"
    options: Options = field(default_factory=dict)
    ema_decay: float | None = None

    @property
    def spec(self) -> OptimizerSpec:
        """Its row in the table."""
        return OPTIMIZERS.get(self.name) or _class_spec(self.name)

    @property
    def is_class(self) -> bool:
        """Whether it is a class from outside, of whose state nothing is known."""
        return self.name not in OPTIMIZERS

    @property
    def fused(self) -> bool:
        """Whether its step is one kernel for many tensors, without memory for temporaries (`fused` of torch.optim)."""
        return bool(self.options.get(FUSED))

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages whose versions affect its numbers, beside torch."""
        return (self.spec.package.name,) if self.spec.package else ()

    def build(self, rate: float, trained: Iterable["nn.Parameter"]) -> "Optimizer":
        """Create the optimizer of trained parameters at a learning rate."""
        return self.spec.build(rate, self.options, trained)

    def state_bytes(self, shapes: Iterable[tuple[int, ...]]) -> int:
        """Return the bytes of its state for trained tensors, and of their averages."""
        spec, average = self.spec, FLOAT32 if self.ema_decay else 0
        return sum(spec.state_bytes(shape, self.options) + average * math.prod(shape) for shape in shapes)

    def update_bytes(self, shapes: Iterable[tuple[int, ...]], device: str) -> int:
        """Return the bytes that its step works with."""
        spec = self.spec
        return sum(spec.update_bytes(shape, self.options, device) for shape in shapes)


def choose_optimizer(parameters: Parameters, origin: Origin, invalid: frozenset[str]) -> OptimizerChoice:
    """Return the optimizer that the parameters name. Reports problems.

    Args:
        origin: where its name comes from: a recipe must not name code to run.
        invalid: parameters with a wrong value, reported already.
    """
    name = parameters.optimizer
    given = {} if "optimizer_args" in invalid else split_arguments(parameters.optimizer_args)
    if name in OPTIMIZERS:
        spec = OPTIMIZERS[name]
        if spec.package:
            report_missing(*missing_package(f"`optimizer` `{name}`", spec.package))
        report(*_argument_problems(name, given, spec.options))
        report(*_parameter_problems(name, parameters, given, spec))
        return OptimizerChoice(name, _options(parameters, given, spec), parameters.ema_decay)
    found = _find_class(name, origin)
    if found is None:
        return OptimizerChoice()
    spec = _class_spec(name, found)
    problems = list(_argument_problems(name, given, spec.options))
    report(*problems, *_parameter_problems(name, parameters, given, spec))
    options = _options(parameters, given, spec)
    report(*([] if problems else _trial_problems(name, found, parameters.learning_rate, options)))
    return OptimizerChoice(name, options, parameters.ema_decay)


def with_kernel(
    optimizer: OptimizerChoice,
    device: str,
    mixed_precision: str,
    *,
    sharded: bool = False,
    recorded: bool | None = None,
) -> OptimizerChoice:
    """Return an optimizer with the kernel that it uses unless its arguments say: fused on a CUDA device.

    Not in fp16: given a fused optimizer, `GradScaler.step` always calls it and leaves it to the kernel to skip the step
    (torch/amp/grad_scaler.py), so that accelerate counts none as skipped.

    Args:
        sharded: whether processes update parts of tensors, for which it is not the default.
        recorded: whether that of the run to resume is fused: another kernel rounds otherwise.
    """
    if optimizer.is_class or FUSED not in optimizer.spec.options or FUSED in optimizer.options:
        return optimizer
    by_default = device.partition(":")[0] == "cuda" and mixed_precision != "fp16" and not sharded
    fused = by_default if recorded is None else recorded
    return replace(optimizer, options={**optimizer.options, FUSED: True}) if fused else optimizer


def rate_warnings(parameters: Parameters, optimizer: OptimizerChoice) -> Iterator[Problem]:
    """Warn about a rate that is usual for AdamW, where the optimizer multiplies it by a step size of its own."""
    rate = parameters.learning_rate
    spec = optimizer.spec
    if spec.low_rate and rate < spec.low_rate[0] and not spec.takes_rate_as_is(optimizer.options):
        usual, why = spec.low_rate
        yield Problem(f"`learning_rate` is {rate:g}, but {why}", f"set `--learning_rate` to {usual:g} or more")


def _options(parameters: Parameters, given: Mapping[str, str], spec: OptimizerSpec) -> dict[str, Any]:
    """Return the options: values of parameters, and over them those of arguments; what cannot be read is left out."""
    options = {option: getattr(parameters, parameter) for parameter, option in spec.parameters.items()}
    for option, text in given.items():
        if option in spec.options:
            try:
                options[option] = spec.options[option].read(text)
            except ValueError:
                continue
    return options


def _argument_problems(name: str, given: Mapping[str, str], known: Mapping[str, Option]) -> Iterator[Problem]:
    """Yield what is wrong with the arguments: one problem for all unknown names, and one for each wrong value."""
    for option in SET_BY_THE_LOOP.keys() & given.keys():
        parameter = SET_BY_THE_LOOP[option]
        what = f"`optimizer_args` sets `{option}`, which is the parameter `{parameter}`"
        yield Problem(what, f"pass `--{parameter} {given[option]}` instead", wrong_use=True)
    unknown = [option for option in given if option not in known and option not in SET_BY_THE_LOOP]
    if unknown:
        named = ", ".join(f"`{option}`" for option in unknown)
        has = f"its arguments are {', '.join(sorted(known))}" if known else "it has no arguments"
        yield Problem(f"`optimizer_args`: the optimizer `{name}` does not take {named}", has, wrong_use=True)
    for option, text in given.items():
        if option in known:
            try:
                known[option].read(text)
            except ValueError:
                what = f"`optimizer_args`: `{option}` of `{name}` takes {known[option].words}, got `{truncate(text)}`"
                yield Problem(what, wrong_use=True)


def _parameter_problems(
    name: str, parameters: Parameters, given: Mapping[str, str], spec: OptimizerSpec
) -> Iterator[Problem]:
    """Yield parameters that are set but that the optimizer does not take, or that an argument sets too."""
    for parameter in filter(parameters.given, SET_BY_PARAMETERS):
        option = spec.parameters.get(parameter)
        if option is None:
            other = "betas" if parameter == "adam_betas" and "betas" in spec.options else None
            hint = f"pass its own with `--optimizer_args {other}=…`" if other else "remove it"
            yield Problem(f"`{parameter}` does not apply to the optimizer `{name}`", hint, wrong_use=True)
        elif option in given:
            what = f"`{option}` of the optimizer is set twice, by `{parameter}` and in `optimizer_args`"
            yield Problem(what, "remove one of them", wrong_use=True)


def _find_class(name: str, origin: Origin) -> "type[Optimizer] | None":
    """Return the class with this dotted path; None if it cannot be used, which is reported."""
    module, _, attribute = name.rpartition(".")
    known = ", ".join(OPTIMIZERS)
    if not module:
        near = suggest(name, OPTIMIZERS)
        hint = f"did you mean `{near}`?" if near else f"the optimizers are {known}; or pass `package.module.Class`"
        report(Problem(f"`optimizer`: there is no optimizer `{name}`", hint, wrong_use=True))
        return None
    if origin.kind not in ("flag", "config"):
        what = f"`optimizer` `{name}` is a class ({origin}), but a recipe may only name {known}"
        report(Problem(what, "pass it as a flag, or in your own `--config` file", wrong_use=True))
        return None
    problem = None
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever foreign code raises when it is imported
        problem = f"cannot be imported: {type(error).__name__}: {error}"
    else:
        problem = _class_fault(found, module, attribute)
    if problem:
        report(Problem(f"`optimizer` `{name}` {problem}", f"the optimizers are {known}", wrong_use=True))
        return None
    return found


def _class_fault(found: object, module: str, attribute: str) -> str | None:
    """Return why an object cannot be the optimizer of a run."""
    from torch.optim import Optimizer

    if found is None:
        return f"does not exist: `{module}` has no `{attribute}`"
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        return "is not a subclass of `torch.optim.Optimizer`"
    closure = list(inspect.signature(found.step).parameters.values())[1:2]
    if closure and closure[0].default is inspect.Parameter.empty and closure[0].name == "closure":
        return "evaluates the model in its step, which is not supported"
    if callable(getattr(found, "train", None)) and callable(getattr(found, "eval", None)):
        return "has other weights for training than for evaluation, and checkpoints would hold the wrong ones"
    return None


def _class_spec(name: str, found: "type[Optimizer] | None" = None) -> OptimizerSpec:
    """Return the row of a class: its arguments are those of its signature, its state is counted like AdamW's."""
    options = _signature(found) if found else {}
    return OptimizerSpec(
        title=name,
        build=partial(_build_class, name),
        state_bytes=per_number(8),
        update_bytes=on_accelerators(4),
        options=options,
        parameters=DECAY if "weight_decay" in options else {},
        by_tensor=False,
    )


def _signature(found: "type[Optimizer]") -> dict[str, Option]:
    """Return the arguments of a class that can be set by name, but the parameters to train and the learning rate."""
    _, _, *named = inspect.signature(found.__init__).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in named if parameter.kind in kinds]
    return {name: Option("a value", read_any) for name in names if name not in SET_BY_THE_LOOP}


def _build_class(name: str, rate: float, options: Options, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    takes_rate = "lr" in inspect.signature(found.__init__).parameters
    optimizer: Optimizer = found(trained, **({"lr": rate} if takes_rate else {}), **options)
    return optimizer


def _trial_problems(name: str, found: "type[Optimizer]", rate: float, options: Options) -> list[Problem]:
    """Return the problem of options that a class rejects, by creating one for a small parameter."""
    from torch import nn, zeros

    try:
        _build_class(name, rate, options, [nn.Parameter(zeros(2, 2))])
    except Exception as error:  # whatever foreign code raises
        shown = " ".join(f"{option}={value}" for option, value in options.items())
        what = f"`optimizer` `{name}` cannot be created with `{shown}`: {type(error).__name__}: {error}"
        return [Problem(what, "change `--optimizer_args`", wrong_use=True)]
    return []
