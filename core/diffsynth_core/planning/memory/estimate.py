"""How much memory a run takes, from sizes alone. No torch.

Counted are weights, adapters, gradients, the optimizer's state and what autograd keeps of the largest micro-batch; not
counted is what operations need while they work, nor the driver.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from diffsynth_core.config.choices import COMPUTE_DTYPES, SWAP_BUFFERS
from diffsynth_core.models.activation_cache import StepActivations
from diffsynth_core.models.bases import part_of
from diffsynth_core.models.encoded_sizes import EncodedSize
from diffsynth_core.models.shapes import layers_of_blocks
from diffsynth_core.models.size_facts import BYTES
from diffsynth_core.models.weight_store import find_store
from diffsynth_core.planning.data.two_stage import components_of
from diffsynth_core.planning.memory.activations import (
    decoder_activations,
    encoder_activations,
    measured_encoders,
    step_activations,
    step_components,
)
from diffsynth_core.planning.memory.block_swap import trained_blocks, units_of_blocks
from diffsynth_core.planning.memory.memory_config import MemoryConfig
from diffsynth_core.planning.memory.remembered import remembered
from diffsynth_core.planning.memory.sharding import Shares
from diffsynth_core.planning.memory.trained_sizes import (
    float32_shapes,
    full_weights,
    lora_numbers,
    rounded_shapes,
    trainable_shapes,
    trained_shapes,
    trained_tensor_bytes,
)
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT

ROUNDING_BYTES = 16
"""Per number of a tensor in bfloat16 while it is updated: weight, gradient and update in float32, and a temporary."""
KEPT_ENCODINGS = 256 << 20
"""Bytes of encodings that a process with its workers keeps in host memory once they were read."""
PREFETCHED = 2
"""Micro-batches that each worker has ready (`prefetch_factor` of PyTorch's DataLoader)."""


class Planned(Protocol):
    """A plan of any command that loads a model."""

    @property
    def model(self) -> ModelPlan:
        """The model."""


EXCHANGED = 4
"""Tensors as large as the input of a block that it has beside others while processes exchange tokens and heads:
queries, keys, values and what attention makes of them. Measured on a CPU, at 4,096 tokens."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the device while training, by part.

    `autocast_weights`: autocast copies of weights, which live until the forward pass ends. They raise the peak only
    with gradient accumulation or DDP, when there are gradients already, and only if larger than a recomputed block.
    `update`: what the optimizer works with in its step, when activations and casts are gone, or in the passes with a
    fused backward pass.
    `on_host`: what waits in host memory for the backward pass.
    `swap_buffers`: room for weights that are copied from host memory; `weights` is without all that wait there.
    `swapped`: weights that wait in host memory.
    `buckets`: buffers in which gradients are sent to other processes (`gradient_as_bucket_view` of DDP is off in
    PyTorch).
    `gathered`: weights that are whole for the time of their use, where processes divide them.
    `offloaded`: weights, gradients and optimizer state that the engine keeps in host memory.
    `set_aside`: a copy of the trained weights while their averages are evaluated, with a fused backward pass; without,
    it takes no more than the gradients, which are gone then.
    """

    weights: Mapping[str, int]
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    autocast_weights: int
    on_host: int
    update: int
    updated_in_passes: bool = False
    swap_buffers: int = 0
    swapped: int = 0
    buckets: int = 0
    gathered: int = 0
    offloaded: int = 0
    set_aside: int = 0

    @property
    def update_is_fullest(self) -> bool:
        """Whether the step of the optimizer takes more than the passes before it."""
        return not self.updated_in_passes and self.update > self.activations + self.autocast_weights

    @property
    def between_steps(self) -> int:
        """Bytes when a step has ended, and with it its gradients and activations."""
        weights = sum(self.weights.values()) + self.swap_buffers + self.gathered
        return weights + self.adapters + self.buckets + self.optimizer

    @property
    def total(self) -> int:
        """Peak bytes: what lasts, and the larger of the passes and the update of a step."""
        lasting = self.between_steps + self.gradients
        passes = self.activations + self.autocast_weights
        if self.updated_in_passes:
            return lasting + passes + max(self.update, self.set_aside)
        return lasting + max(passes, self.update)


@dataclass(frozen=True)
class EncodingMemory:
    """Bytes on the device while one frozen encoder works."""

    component: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.weights + self.activations


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes on the device while the VAE decodes previews; `beside`: of what trains."""

    component: str
    beside: int
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.beside + self.weights + self.activations


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device: each encoder comes and goes before training begins, and the VAE that decodes previews
    between its steps.
    """

    training: TrainingMemory | None
    encoding: tuple[EncodingMemory, ...]
    decoding: DecodingMemory | None = None

    @property
    def stages(self) -> list[EncodingMemory | TrainingMemory | DecodingMemory]:
        """What follows each other: each encoder, the steps of training, and decoding."""
        parts = (*self.encoding, self.training, self.decoding)
        return [part for part in parts if part]

    @property
    def peak(self) -> int:
        """Peak bytes of the run."""
        return max((stage.total for stage in self.stages), default=0)


def device_memory(plan: RunPlan, config: MemoryConfig) -> DeviceMemory:
    """Memory of the device at its fullest, by stage and part."""
    training = training_memory(plan, config) if plan.task.trains and _sizes_known(plan) else None
    return DeviceMemory(training, encoding_memory(plan, config), _decoding_memory(plan, config, training))


def unknown_parts(plan: RunPlan) -> list[str]:
    """What takes memory and is not in the estimate, as words."""
    needed = components_of(plan.task, plan.model.variant) | plan.model.components.keys()
    unknown = [f"the size of {name}" for name in needed if not count_parameters(plan, name)]
    measured = {plan.model.facts.denoiser, *(encoder.component for encoder in measured_encoders(plan))}
    measured |= step_components(plan) & set(plan.model.variant.step_components)
    in_step = {*plan.training.components, *plan.model.variant.step_components}
    unknown += [f"activations that autograd keeps of {name}" for name in in_step - measured]
    if plan.task.trains and plan.training.optimizer.is_class:
        unknown.append(f"the state of `{plan.training.optimizer.name}`, counted like that of AdamW")
    return sorted(unknown)


def count_parameters(plan: Planned, component: str) -> int:
    """Number of parameters of a component; 0 if unknown."""
    shapes = plan.model.shapes.get(component)
    if shapes:
        return sum(map(math.prod, shapes.values()))
    return plan.model.published[component].parameters if component in plan.model.published else 0


def update_bytes(plan: RunPlan, config: MemoryConfig) -> int:
    """Bytes that the step works with: for all float32 tensors, and then for the largest of the others; or for the
    largest of all, with its state if states are on the host.
    """
    optimizer, dtype = config.optimizer, config.trained_dtype
    whole, rounded = float32_shapes(plan, config.rank, dtype), rounded_shapes(plan, dtype)
    if not (config.fused_backward or config.optimizer_on_host):
        at_once = optimizer.update_bytes(whole, config.device)
        return max(at_once, ROUNDING_BYTES * max(map(math.prod, rounded), default=0))

    on_host = bool(states_on_host(plan, config))

    def state(shape: tuple[int, ...]) -> int:
        return optimizer.state_bytes([shape]) if on_host else 0

    of_whole = [optimizer.update_bytes([shape], config.device) + state(shape) for shape in whole]
    return max([*of_whole, *(ROUNDING_BYTES * math.prod(shape) + state(shape) for shape in rounded)], default=0)


def waiting_blocks(plan: RunPlan, config: MemoryConfig) -> list[list[tuple[tuple[int, ...], bool]]]:
    """Blocks whose trained weights wait in host memory: shape of each weight, and whether it trains in bfloat16."""
    in_bf16 = config.trained_dtype == "bf16"
    blocks = trained_blocks(plan.model, plan.training, config.blocks_to_swap)
    found: dict[str | None, list[tuple[tuple[int, ...], bool]]] = {block: [] for block in blocks}
    for weight in full_weights(plan) if blocks else ():
        if weight.block in found:
            found[weight.block].append((weight.shape, in_bf16 and not weight.stays_float32))
    return list(found.values())


def states_on_host(plan: RunPlan, config: MemoryConfig) -> list[tuple[int, ...]]:
    """Shapes of the tensors whose optimizer state waits in host memory."""
    if config.optimizer_on_host:
        return trained_shapes(plan, config.rank)
    return [shape for block in waiting_blocks(plan, config) for shape, _ in block]


def state_on_device(plan: RunPlan, config: MemoryConfig) -> int:
    """Bytes of the optimizer's state on the device."""
    state = config.optimizer.state_bytes(trained_shapes(plan, config.rank))
    return state - config.optimizer.state_bytes(states_on_host(plan, config))


def training_memory(plan: RunPlan, config: MemoryConfig) -> TrainingMemory:
    """Memory of the largest micro-batch's step, in each process."""
    whole, engine = _whole_memory(plan, config), plan.machine.engine.spec
    if engine.updates_copies:
        update = update_bytes(plan, replace(config, trained_dtype="float32"))
        whole = replace(whole, gradients=sum(trained_tensor_bytes(plan, config.rank, "float32")), update=update)
    return _divided(plan, config, whole) if engine.shards else whole


def _divided(plan: RunPlan, config: MemoryConfig, whole: TrainingMemory) -> TrainingMemory:
    """What each process holds if an engine divides what every process would hold without."""
    engine, facts = plan.machine.engine, plan.model.facts
    shares = Shares(engine, plan.machine.world_size)
    of_weights = {
        name: bytes_of_weights(
            plan, name, config.precision, config.storage.get(name, "plain"), _float32_weights(plan, name, config)
        )
        for name in whole.weights
        if plan.model.shapes.get(name)
    }
    trained = {
        name: {key: math.prod(shape) * BYTES["float32"] for key, shape in found.items()}
        for name in whole.weights
        if (found := trainable_shapes(plan, name))
    }
    weights = {name: shares.weights(size) for name, size in whole.weights.items()}
    adapters, gradients = shares.weights(whole.adapters), shares.gradients(whole.gradients)
    optimizer, update = shares.optimizer(whole.optimizer), shares.optimizer(whole.update)
    copies = shares.copies(sum(map(math.prod, trained_shapes(plan, config.rank))))
    of_gradients = sum(sum(of_component.values()) for of_component in trained.values())
    divided = replace(
        whole,
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer + copies,
        update=update,
        buckets=shares.buckets(facts, trained, max(whole.gradients - of_gradients, 0)),
        gathered=shares.gathered(facts, of_weights),
    )
    if config.device == "cpu":
        return divided
    if engine.offload_optimizer:
        moved = divided.optimizer + divided.gradients + divided.update
        divided = replace(divided, optimizer=0, gradients=0, update=0, offloaded=moved)
    if engine.offload_weights:
        moved = sum(weights.values()) + adapters
        divided = replace(divided, weights=dict.fromkeys(weights, 0), adapters=0, offloaded=divided.offloaded + moved)
    return divided


def _whole_memory(plan: RunPlan, config: MemoryConfig) -> TrainingMemory:
    """Memory of the largest micro-batch's step in a process that holds everything."""
    names = {
        plan.model.facts.denoiser,
        *plan.model.variant.step_components,
        *plan.training.components,
    } & plan.model.components.keys()
    adapters = lora_numbers(plan, config.rank)
    activations = step_activations(plan, config)
    if plan.machine.context_parallel > 1:
        activations = _of_process(activations, plan)
    gradients = trained_tensor_bytes(plan, config.rank, config.trained_dtype)
    kept = activations.checkpointed if config.recompute else activations.stored
    kept *= max((sample.sampling.steps for sample in plan.data.samples.samples if sample.sampling), default=1)
    on_host = kept if config.offload and config.device != "cpu" else 0
    block, casts = 0, 0
    if config.recompute:
        # Beside the inputs of the block that is recomputed are those of the next one, which come back meanwhile.
        block = activations.largest_block + (2 * activations.block_inputs if on_host else 0)
        early = plan.parameters.gradient_accumulation_steps > 1 or plan.machine.world_size > 1
        early = early and not plan.machine.engine.spec.shards_weights  # which cast gathered weights at each use
        casts = activations.autocast_weights if early and activations.autocast_weights > block else 0
    weights = {name: weight_bytes(plan, name, config) for name in sorted(names)}
    units = swapped_bytes(plan, config)
    if units:
        weights[plan.model.facts.denoiser] -= sum(units)
    return TrainingMemory(
        weights=weights,
        adapters=adapters * BYTES["float32"],
        gradients=max(gradients, default=0) if config.fused_backward else sum(gradients),
        optimizer=state_on_device(plan, config),
        activations=kept - on_host + (0 if casts else block),
        autocast_weights=casts,
        on_host=on_host,
        update=update_bytes(plan, config),
        updated_in_passes=config.fused_backward,
        set_aside=set_aside(plan, config).device if config.fused_backward else 0,
        swap_buffers=max(units, default=0) * min(SWAP_BUFFERS, len(units)),
        swapped=sum(units),
        buckets=sum(gradients) if plan.machine.world_size > 1 else 0,
    )


def _of_process(whole: StepActivations, plan: RunPlan) -> StepActivations:
    """Return the activations of each of several processes that compute a sample together.

    Each has its part of those of the denoiser. What the first block gets is whole in each of them, and a block works
    with copies of what is exchanged. Encoders that train are whole in all; with them, all counts as whole.
    """
    processes = 1 if measured_encoders(plan) else plan.machine.context_parallel
    return replace(
        whole,
        stored=whole.stored // processes + whole.block_inputs,
        checkpointed=whole.checkpointed // processes + whole.block_inputs,
        largest_block=(whole.largest_block + EXCHANGED * whole.block_inputs) // processes,
        block_inputs=whole.block_inputs // processes,
    )


class Copies(NamedTuple):
    """Bytes of copies of weights, each where its weight is."""

    device: int
    host: int


def set_aside(plan: RunPlan, config: MemoryConfig) -> Copies:
    """Copies of the trained weights that are kept while their averages are validated and draw previews."""
    if not plan.parameters.evaluate_ema:
        return Copies(0, 0)
    trained = sum(trained_tensor_bytes(plan, config.rank, config.trained_dtype))
    waiting = sum(swapped_bytes(plan, config)) if waiting_blocks(plan, config) else 0
    return Copies(trained - waiting, waiting)


def weight_bytes(plan: RunPlan, component: str, config: MemoryConfig) -> int:
    """Bytes of a component's weights, wherever they are: float32 where they train, else as the run keeps them."""
    storage = config.storage.get(component, "plain")
    return frozen_bytes(plan, component, config.precision, storage, _float32_weights(plan, component, config))


def _float32_weights(plan: RunPlan, component: str, config: MemoryConfig) -> frozenset[str]:
    """Module keys of a component's weights that train in float32."""
    shapes, files = plan.model.shapes.get(component), plan.model.components.get(component)
    return config.training(plan).float32_weights(component, files.layout, shapes) if files and shapes else frozenset()


def swapped_bytes(plan: RunPlan, config: MemoryConfig) -> list[int]:
    """Bytes of each group of the denoiser's weights that wait in host memory and are copied together."""
    denoiser, split = plan.model.facts.denoiser, plan.parameters.cpu_offload_split_threshold
    units = units_of_blocks(plan.model, plan.training, config.blocks_to_swap, split)
    if trained := waiting_blocks(plan, config):
        low, wide = BYTES["bfloat16"], BYTES["float32"]
        return [sum(math.prod(shape) * (low if rounded else wide) for shape, rounded in block) for block in trained]
    sizes = bytes_of_weights(plan, denoiser, config.precision, config.storage.get(denoiser, "plain")) if units else {}
    return [sum(sizes[f"{layer}.weight"] for layer in unit) for unit in units]


def frozen_bytes(
    plan: Planned, component: str, precision: str, storage: str, trained: frozenset[str] = frozenset()
) -> int:
    """Bytes of a component's weights in a weight store; those in `trained`, by module key, are float32."""
    if not plan.model.shapes.get(component):
        return count_parameters(plan, component) * BYTES[COMPUTE_DTYPES[precision]]
    return sum(bytes_of_weights(plan, component, precision, storage, trained).values())


@remembered
def bytes_of_weights(
    plan: Planned, component: str, precision: str, storage: str, trained: frozenset[str] = frozenset()
) -> Mapping[str, int]:
    """Bytes of each weight of a component whose shapes are known, by module key; as `frozen_bytes`."""
    shapes, low = plan.model.shapes[component], BYTES[COMPUTE_DTYPES[precision]]
    fp32 = {*filter(plan.model.facts.component(component).stays_float32, shapes), *trained}
    stored = bytes_in_layers(plan, component, storage)
    sizes = {name: math.prod(shape) * (BYTES["float32"] if name in fp32 else low) for name, shape in shapes.items()}
    return sizes | {name: size for name, size in stored.items() if name not in fp32}


def bytes_in_layers(plan: Planned, component: str, storage: str) -> dict[str, int]:
    """Bytes of each weight that is kept in the layers of a weight store, by module key."""
    shapes, store = plan.model.shapes[component], find_store(storage)
    layers = filter(store.takes, layers_of_blocks(shapes)) if store.bytes_per_weight else ()
    weights = (f"{layer}.weight" for layer in layers)
    stays = plan.model.facts.component(component).stays_float32
    return {name: store.nbytes(shapes[name]) for name in weights if not stays(name)}


def encoding_memory(plan: RunPlan, config: MemoryConfig) -> tuple[EncodingMemory, ...]:
    """Memory of each frozen encoder while it encodes the largest sample."""
    if plan.data.encoded:
        return ()
    encoders = {encoder.component for encoder in plan.model.variant.encoders}
    frozen = sorted((encoders & plan.model.components.keys()) - plan.training.components)
    in_encoders = as_encoders_compute(config)
    return tuple(
        EncodingMemory(name, weight_bytes(plan, name, in_encoders), encoder_activations(plan, name, in_encoders))
        for name in frozen
    )


def _decoding_memory(plan: RunPlan, config: MemoryConfig, training: TrainingMemory | None) -> DecodingMemory | None:
    """Memory of the VAE while it decodes a preview, beside what trains. None without previews."""
    if not (plan.previews and training):
        return None
    component, in_decoder = plan.model.variant.decoder, as_encoders_compute(config)
    weights, activations = weight_bytes(plan, component, in_decoder), decoder_activations(plan, in_decoder)
    return DecodingMemory(component, training.between_steps, weights, activations)


def as_encoders_compute(config: MemoryConfig) -> MemoryConfig:
    """Return the configuration of frozen encoders: float32 in place of fp16 (`ENCODER_DTYPES`)."""
    return replace(config, precision="no") if config.precision == "fp16" else config


def host_memory(plan: RunPlan, config: MemoryConfig, memory: DeviceMemory, encoded: EncodedSize) -> dict[str, int]:
    """Bytes of host memory by what they are for, beside Python and its libraries.

    `encoded`: of all samples.
    """
    parameters = plan.parameters
    known = [name for name, shapes in plan.model.shapes.items() if shapes]
    largest = max((_loading_bytes(plan, name, config) for name in known), default=0)
    unknown = [name for name in plan.model.components if not plan.model.shapes.get(name)]
    of_others = f" ({', '.join(unknown)}: unknown without files)" if unknown else ""
    parts = {f"the largest tensor while it is loaded{of_others}": largest} if largest else {}
    if memory.training and (parameters.initialize_model_on_cpu or waiting_blocks(plan, config)):
        parts["weights in transfer to the device"] = max(memory.training.weights.values())
    if memory.training and memory.training.swapped:
        parts[f"swapped blocks of {plan.model.facts.denoiser}, in each process"] = memory.training.swapped
        parts["the largest of them while it is loaded"] = max(swapped_bytes(plan, config))
    if memory.training and (aside := set_aside(plan, config).host):
        parts["a copy of trained weights while their averages are evaluated"] = aside
    if memory.training and memory.training.on_host:
        parts["offloaded activations"] = memory.training.on_host
    if memory.training and memory.training.offloaded:
        what = f"what {plan.machine.engine.spec.title} offloads, in each process"
        parts[what] = memory.training.offloaded
    if memory.training and (waiting := states_on_host(plan, config)):
        parts["optimizer state"] = config.optimizer.state_bytes(waiting)
    if memory.training and plan.data.samples.samples:
        parts["encodings that were read"] = min(KEPT_ENCODINGS, encoded.bytes_in(config.precision))
    if parameters.dataset_num_workers and plan.data.samples.samples:
        sample = encoded.bytes_in(config.precision) // len(plan.data.samples.samples)
        ready = parameters.dataset_num_workers * PREFETCHED * config.sizes.batch * sample
        parts[f"samples prefetched by {pluralize(parameters.dataset_num_workers, 'worker')}"] = ready
    return parts


def _loading_bytes(plan: RunPlan, component: str, config: MemoryConfig) -> int:
    """Bytes of host memory of a component's largest tensor while it is loaded: as its file has it, and converted."""
    shapes, read = plan.model.shapes[component], file_number_bytes(plan, component)
    trained = _float32_weights(plan, component, config)
    converted = bytes_of_weights(plan, component, config.precision, "plain", trained)
    return max(round(math.prod(shape) * read) + converted[name] for name, shape in shapes.items())


@remembered
def file_number_bytes(plan: Planned, component: str) -> float:
    """Bytes of a number in a component's files, of the widest dtype there."""
    if component in plan.model.published:
        return BYTES[plan.model.published[component].dtype]
    tensors = part_of(plan.model.components[component]).tensors.values()
    return max(BITS_PER_ELEMENT[tensor.dtype] for tensor in tensors) / 8


def _sizes_known(plan: RunPlan) -> bool:
    return bool(plan.model.shapes.get(plan.model.facts.denoiser))
