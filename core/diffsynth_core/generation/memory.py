"""The weights that are on the device at once while images are drawn, and the storage in which they fit. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote

from diffsynth_core.config.choices import ENCODER_DTYPES
from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.generation.plan import Generation
from diffsynth_core.planning.memory.estimate import frozen_bytes
from diffsynth_core.planning.memory.memory_config import device_and_precision

Storage = Mapping[str, str]
"""Component -> the weight store that keeps its weights, where it is not that of the plan."""


@dataclass(frozen=True)
class StorageOption:
    """Components to keep in 8-bit floats.

    Attributes:
        flag: that keeps them so, quoted for a shell.
        peak: bytes of the largest moment with it.
    """

    components: tuple[str, ...]
    flag: str
    peak: int


def weights_at_once(generation: Generation, storage: Storage | None = None) -> dict[str, int]:
    """Return the bytes of weights at each moment, by the names of the components that are there.

    On an accelerator, whatever this machine has, unless the CPU is asked for.
    """
    moments = _moments(generation.plans[0])  # those of further checkpoints have the same shapes
    return {
        " and ".join(names): sum(_weight_bytes(generation, name, storage or {}) for name in names) for names in moments
    }


def weights_fit(generation: Generation) -> bool:
    """Return whether the weights fit in `gpu_memory`, if that is given."""
    asked = generation.parameters.gpu_memory
    return not asked or max(weights_at_once(generation).values()) < memory_bytes(asked)


def find_storage(generation: Generation, limit: int) -> StorageOption | None:
    """Return the fewest components, the largest ones, that make the weights fit in `limit` bytes if they are kept in
    8-bit floats; None if they do not fit with all of them so.
    """
    plan = generation.plans[0]
    changed: dict[str, str] = {}
    for names in _moments(plan):
        while sum(_weight_bytes(generation, name, changed) for name in names) >= limit:
            saved = {name: _saved_bytes(generation, name) for name in names if name not in changed}
            best = max(saved, key=lambda name: saved[name], default="")
            if not best or saved[best] <= 0:
                return None
            changed[best] = "float8"
    kept = [files for name, files in plan.model.components.items() if changed.get(name, files.storage) == "float8"]
    entries = dict.fromkeys(files.origin.partition(", ")[0] for files in kept)
    flag = f"--fp8_models {quote(','.join(entries))}"
    return StorageOption(tuple(changed), flag, max(weights_at_once(generation, changed).values()))


def sizes_are_known(generation: Generation) -> bool:
    """Return whether the tensors of all components are known, and so what 8-bit floats would save."""
    model = generation.plans[0].model
    return all(model.shapes.get(name) for names in _moments(generation.plans[0]) for name in names)


def _moments(plan: GenerationPlan) -> list[list[str]]:
    """Return the components that are on the device together, as `draw` loads them: each encoder alone, then the
    denoiser with the decoder, or of two denoisers the second with it.
    """
    model = plan.model
    decoder, steps = model.variant.decoder, model.variant.step_components
    second = model.facts.second_denoiser
    stages = [[model.facts.denoiser, *steps]]
    if second in model.components:
        stages.append([second, *steps])
    stages[-1].append(decoder)
    encoders = dict.fromkeys(encoder.component for encoder in model.variant.encoders)
    moments = [[name] for name in encoders if name != decoder] + stages
    present = [[name for name in moment if name in model.components] for moment in moments]
    return [names for names in present if names]


def _weight_bytes(generation: Generation, name: str, storage: Storage) -> int:
    plan = generation.plans[0]
    _, precision = device_and_precision(generation.parameters, plan.machine)
    encodes = name in {encoder.component for encoder in plan.model.variant.encoders}
    # Encoders compute in float32 where the range of fp16 would not do.
    own = "no" if encodes and ENCODER_DTYPES[precision] == "float32" else precision
    return frozen_bytes(plan, name, own, storage.get(name, plan.model.components[name].storage))


def _saved_bytes(generation: Generation, name: str) -> int:
    """Return the bytes that 8-bit floats save of a component; 0 if it cannot be kept in them."""
    plan = generation.plans[0]
    merged = any(one.component == name and one.lora.tensors for job in plan.jobs for one in job.adapters)
    if merged or not plan.model.shapes.get(name):
        return 0
    return _weight_bytes(generation, name, {}) - _weight_bytes(generation, name, {name: "float8"})
