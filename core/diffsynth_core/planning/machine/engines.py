"""What distributes the steps of a run over processes, as accelerate's launcher or its configuration asks. No torch."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffsynth_core.config.origins import Stated
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, list_names
from diffsynth_core.planning.packages import Package, missing_package
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from diffsynth_core.progress import verb

EngineName = Literal["replicated", "fsdp2", "zero1", "zero2", "zero3"]
DEEPSPEED = Package("deepspeed", "deepspeed", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine divides among processes; the rest, every process holds whole.

    Attributes:
        title: its name in texts.
        updates_copies: whether it updates a float32 copy of the trained weights, whatever these are kept in.
        package: what must be installed for it.
    """

    title: str
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    updates_copies: bool = False
    package: Package | None = None

    @property
    def shards(self) -> bool:
        """Whether it divides anything, so that every process updates a part of the tensors."""
        return self.shards_optimizer


ENGINES: Mapping[EngineName, EngineSpec] = {
    "replicated": EngineSpec(title="DDP"),
    "fsdp2": EngineSpec(title="FSDP2", shards_weights=True, shards_gradients=True, shards_optimizer=True),
    "zero1": EngineSpec(title="DeepSpeed ZeRO-1", shards_optimizer=True, updates_copies=True, package=DEEPSPEED),
    "zero2": EngineSpec(
        title="DeepSpeed ZeRO-2",
        shards_gradients=True,
        shards_optimizer=True,
        updates_copies=True,
        package=DEEPSPEED,
    ),
    "zero3": EngineSpec(
        title="DeepSpeed ZeRO-3",
        shards_weights=True,
        shards_gradients=True,
        shards_optimizer=True,
        updates_copies=True,
        package=DEEPSPEED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The engine of a run.

    Attributes:
        offload_optimizer: whether the state of the optimizer is in host memory, where it is updated.
        offload_weights: whether what a process holds of the weights is in host memory between its uses.
        reshards: whether weights are divided again after the forward pass, and gathered once more for the backward
            pass; only of engines that divide weights.
        stated: values of the run's parameters in its configuration.
        tuning: entries of `zero_optimization` that DeepSpeed is given besides, by name.
        problems: why it cannot be used, whatever the run.
    """

    name: EngineName = "replicated"
    offload_optimizer: bool = False
    offload_weights: bool = False
    reshards: bool = True
    stated: tuple[Stated, ...] = ()
    tuning: tuple[tuple[str, bool | int | float], ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def spec(self) -> EngineSpec:
        """What the engine divides."""
        return ENGINES[self.name]


REPLICATED = EngineChoice()
SHARDING_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
"""Variables by which accelerate's launcher asks for an engine (`accelerate/utils/launch.py`)."""


STATED_FOR_DEEPSPEED = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""Entries of an accelerate configuration for DeepSpeed, or of DeepSpeed's own, -> the parameter that they state."""
UNSTATED = {
    "mixed_precision": ("none", "auto", "no", "false"),
    "gradient_accumulation_steps": ("none", "auto", "1"),
    "max_grad_norm": ("none", "auto", "0", "0.0"),
}
"""Parameter -> values of a configuration that state nothing: among them the defaults of accelerate's launcher, with
which it fills in what is not said, and which `accelerate config` writes into every file."""
REFUSED = {"optimizer": "optimizer", "scheduler": "lr_scheduler"}
"""Sections of a DeepSpeed configuration -> the parameter that says it here."""
WITHOUT_EFFECT = (
    "zero_optimization", "gradient_clipping", "bf16", "fp16", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "activation_checkpointing", "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""Other sections that are read, or that parameters of the run say: precision, batches, and PyTorch's gradient
checkpointing in place of DeepSpeed's."""
CHOSEN = (
    "stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save", "memory_efficient_linear"
)  # fmt: skip
"""Entries of `zero_optimization` that are read, or about files that DeepSpeed would write."""
TUNING = (
    "overlap_comm", "contiguous_gradients", "sub_group_size", "reduce_bucket_size", "reduce_scatter",
    "allgather_bucket_size", "allgather_partitions", "round_robin_gradients", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
)  # fmt: skip
"""Entries of `zero_optimization` that are handed on: they change memory and speed alone."""


def engine_of_configuration(settings: Mapping[str, Any], source: str) -> EngineChoice:
    """Return the engine that an accelerate configuration asks for.

    Args:
        settings: content of the file.
        source: its name, for messages.
    """
    kind = str(settings.get("distributed_type") or "NO")
    choice, source = REPLICATED, f"`{source}`"
    if kind == "MEGATRON_LM":
        choice = _unsupported(f"{source} launches with Megatron-LM")
    if kind == "FSDP":
        choice = _fsdp(
            {name.removeprefix("fsdp_"): value for name, value in (settings.get("fsdp_config") or {}).items()}, source
        )
    if kind == "DEEPSPEED":
        choice = _deepspeed(settings.get("deepspeed_config") or {}, source)
    return _with_stated(choice, {"mixed_precision": settings.get("mixed_precision")}, source)


def engine_of_environment(environment: Mapping[str, str]) -> EngineChoice:
    """Return the engine that accelerate's launcher asks of the processes that it starts.

    The names of its variables are those of `accelerate/utils/launch.py`.
    """

    def is_set(name: str) -> bool:
        return environment.get(name, "false").lower() == "true"

    choice = REPLICATED
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        choice = _unsupported("launched with Megatron-LM")
    if is_set("ACCELERATE_USE_FSDP"):
        found = {
            name.removeprefix("FSDP_").lower(): value for name, value in environment.items() if name.startswith("FSDP_")
        }
        choice = _fsdp(found, "the launcher")
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        prefix = "ACCELERATE_DEEPSPEED_"
        options = {
            name.removeprefix(prefix).lower(): value for name, value in environment.items() if name.startswith(prefix)
        }
        renamed = {"config_file": "deepspeed_config_file"}
        stated = {name: environment.get(f"ACCELERATE_{name.upper()}") for name in STATED_FOR_DEEPSPEED}
        options = {renamed.get(name, name): value for name, value in options.items()}
        choice = _deepspeed(options | stated, "the launcher")
    return _with_stated(choice, {"mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION")}, "the launcher")


def _with_stated(choice: EngineChoice, stated: Mapping[str, Any], source: str) -> EngineChoice:
    """Return a choice with what a configuration states about the run, besides what another one has stated already."""
    known = {name for name, *_ in choice.stated}
    told = [
        Stated(name, value, source)
        for name, value in stated.items()
        if name not in known and str(value).lower() not in UNSTATED[name]
    ]
    return replace(choice, stated=(*choice.stated, *told))


def _unsupported(what: str) -> EngineChoice:
    hint = "use DDP, FSDP2 or DeepSpeed ZeRO: `--accelerate_config ddp`, `fsdp2`, `zero2` or `zero3`"
    return EngineChoice(problems=(Problem(f"{what}, which is not supported", hint, wrong_use=True),))


def _fsdp(settings: Mapping[str, Any], source: str) -> EngineChoice:
    # The launcher's own default is version 1 (`accelerate/commands/launch.py`).
    version = str(settings.get("version") or "1")
    if version != "2":
        what = f"{source} asks for version {version} of FSDP: version 2 is supported"
        return EngineChoice(
            problems=(Problem(what, "set `fsdp_version: 2`, or pass `--accelerate_config fsdp2`", wrong_use=True),)
        )
    offloads = _is_true(settings.get("offload_params", False))
    return EngineChoice(
        name="fsdp2",
        offload_optimizer=offloads,
        offload_weights=offloads,
        reshards=_is_true(settings.get("reshard_after_forward", True)),
    )


def _deepspeed(settings: Mapping[str, Any], source: str) -> EngineChoice:
    if path := settings.get("deepspeed_config_file"):
        return _deepspeed_file(Path(str(path)))
    devices = {kind: str(settings.get(f"offload_{kind}_device") or "none").lower() for kind in ("optimizer", "param")}
    # The stage that accelerate takes without one (`DeepSpeedPlugin` in accelerate/utils/dataclasses.py).
    return _zero(settings.get("zero_stage", 2), devices, settings, source)


def _deepspeed_file(path: Path) -> EngineChoice:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        zero = settings.get("zero_optimization") or {}
        devices = {kind: (zero.get(f"offload_{kind}") or {}).get("device", "none") for kind in ("optimizer", "param")}
    except (OSError, ValueError, AttributeError) as error:
        problem = Problem(
            f"cannot read the DeepSpeed configuration `{path}`: {error}", "check the file", wrong_use=True
        )
        return EngineChoice(problems=(problem,))
    choice = _zero(zero.get("stage", 0), devices, settings, f"`{path}`")
    tuning = {name: value for name, value in zero.items() if name in TUNING and value != "auto"}
    unused = [name for name in settings if name not in (*WITHOUT_EFFECT, *REFUSED)]
    unused += [f"zero_optimization.{name}" for name in zero if name not in (*TUNING, *CHOSEN)]
    problems = choice.problems
    if unused:
        what = f"`{path}` sets {list_names(unused)}, which {verb(len(unused), 'is', 'are')} not used here"
        problems = (*problems, Problem(what, "remove what is named", wrong_use=True))
    enabled = [name for name in ("bf16", "fp16") if _is_true((settings.get(name) or {}).get("enabled"))]
    choice = replace(choice, tuning=tuple(tuning.items()), problems=problems)
    return _with_stated(choice, {"mixed_precision": enabled[0] if enabled else None}, f"`{path}`")


def _zero(stage: Any, devices: Mapping[str, str], settings: Mapping[str, Any], source: str) -> EngineChoice:
    """Return the engine of a stage of DeepSpeed ZeRO.

    Args:
        devices: where `optimizer` and `param` are offloaded to.
        settings: of DeepSpeed beside the stage.
    """
    choice = {"1": "zero1", "2": "zero2", "3": "zero3"}.get(str(stage))
    problems = []
    if choice is None:
        what = f"{source} asks for stage {stage} of DeepSpeed ZeRO"
        problems.append(Problem(what, "stages 1, 2 and 3 are supported; without, use DDP", wrong_use=True))
    for device in dict.fromkeys(devices.values()):
        if device not in ("none", "cpu"):
            what = f"{source} offloads to {device}, which is not supported"
            problems.append(Problem(what, "offload to cpu, or not at all", wrong_use=True))
    for name, parameter in REFUSED.items():
        if name in settings:
            what = f"{source} sets DeepSpeed's `{name}`, which is a parameter of the run here"
            problems.append(Problem(what, f"remove it, and pass `--{parameter}`", wrong_use=True))
    found = EngineChoice(
        name=choice or "replicated",  # type: ignore[arg-type]
        offload_optimizer=devices["optimizer"] == "cpu",
        offload_weights=devices["param"] == "cpu" and choice == "zero3",  # below, weights are not divided
        problems=tuple(problems),
    )
    stated = {parameter: settings.get(name) for name, parameter in STATED_FOR_DEEPSPEED.items()}
    return _with_stated(found, stated, source)


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


Applies = Callable[[Parameters, OptimizerChoice, str], bool]


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Something that engines which shard cannot train with.

    Attributes:
        applies: whether a run asks for it, by its parameters, optimizer and precision.
        what: it, as the subject of a sentence.
        why: the reason; `{engine}` stands for the engine.
    """

    applies: Applies
    what: str
    why: str
    hint: str
    engines: tuple[EngineName, ...] = ("fsdp2", "zero1", "zero2", "zero3")


WITHOUT_SHARDING = "or train without sharding (`--accelerate_config ddp`)"
EXCLUSIONS = (
    Exclusion(
        applies=lambda parameters, optimizer, precision: parameters.fused_backward,
        what="`fused_backward`",
        why="updates each weight before its gradient has been averaged over processes",
        hint=f"remove it, {WITHOUT_SHARDING}",
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: parameters.enable_optimizer_cpu_offload,
        what="`enable_optimizer_cpu_offload`",
        why="keeps the state of whole tensors on the host, where {engine} updates parts of them",
        hint="remove it, and offload with the engine: `--accelerate_config fsdp2offload` or `zero2offload`",
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: bool(
            parameters.blocks_to_swap or parameters.enable_model_cpu_offload
        ),
        what="`blocks_to_swap`",
        why="moves whole weights between host and device, of which {engine} holds parts",
        hint="remove it, and offload with the engine: `--accelerate_config fsdp2offload`",
        engines=("fsdp2", "zero3"),
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: not optimizer.spec.elementwise,
        what="this optimizer",
        why="updates a number by others of its tensor, of which {engine} gives it a part",
        hint="pass one of the optimizers "
        + ", ".join(f"`--optimizer {name}`" for name, spec in OPTIMIZERS.items() if spec.elementwise)
        + f", {WITHOUT_SHARDING}",
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: precision == "fp16",
        what="`mixed_precision` fp16",
        why="scales the loss by whole gradients, of which {engine} has parts",
        hint=f"pass `--mixed_precision bf16`, {WITHOUT_SHARDING}",
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: parameters.trained_dtype == "bf16",
        what="`trained_dtype` bf16",
        why="leaves some weights in float32, and {engine} divides weights of one dtype",
        hint="remove it: each process holds its part of the float32 weights only",
        engines=("zero3",),
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: parameters.compile,
        what="`compile`",
        why="traces through blocks whose weights {engine} gathers while they run",
        hint="remove it, or use ZeRO-2 (`--accelerate_config zero2`)",
        engines=("fsdp2", "zero3"),
    ),
    Exclusion(
        applies=lambda parameters, optimizer, precision: parameters.checkpointing == "nested",
        what="`checkpointing` `nested`",
        why="recomputes parts of a block once more, when {engine} no longer holds their weights",
        hint="pass `--checkpointing full`, or shard with FSDP2 (`--accelerate_config fsdp2`)",
        engines=("zero3",),
    ),
)
"""The pairs that are refused; the others are run by tests/runs/test_engine_matrix.py."""


def engine_problems(
    parameters: Parameters, optimizer: OptimizerChoice, mixed_precision: str, engine: EngineChoice
) -> Iterator[Problem]:
    """Yield why a run cannot train with its engine."""
    yield from engine.problems
    if engine.spec.package:
        yield from missing_package(engine.spec.title, engine.spec.package)
    yield from exclusions(parameters, optimizer, mixed_precision, engine)


def exclusions(
    parameters: Parameters, optimizer: OptimizerChoice, mixed_precision: str, engine: EngineChoice
) -> Iterator[Problem]:
    """Yield what a run asks for that its engine cannot train with."""
    for row in EXCLUSIONS:
        if engine.name in row.engines and row.applies(parameters, optimizer, mixed_precision):
            what = f"{row.what} does not go with {engine.spec.title}: it {row.why.format(engine=engine.spec.title)}"
            yield Problem(what, row.hint, wrong_use=True)
