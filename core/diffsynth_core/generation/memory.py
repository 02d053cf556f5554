"""The weights that are on the device at once while images are drawn. No torch."""

from diffsynth_core.config.choices import ENCODER_DTYPES
from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.generation.plan import Generation
from diffsynth_core.planning.memory import frozen_bytes
from diffsynth_core.planning.memory_config import device_and_precision


def weights_at_once(generation: Generation) -> dict[str, int]:
    """Return the bytes of weights at each moment, by the names of the components that are there; as `draw` loads them:
    each encoder alone, then the denoiser with the decoder, or of two denoisers the second with it. On an accelerator,
    whatever this machine has, unless the CPU is asked for.
    """
    plan = generation.plans[0]  # those of further checkpoints have the same shapes
    model, (_, precision) = plan.model, device_and_precision(generation.parameters, plan.machine)
    decoder, steps = model.variant.decoder, model.variant.step_components
    second = model.facts.second_denoiser
    stages = [[model.facts.denoiser, *steps]]
    if second in model.components:
        stages.append([second, *steps])
    stages[-1].append(decoder)
    encoders = dict.fromkeys(encoder.component for encoder in model.variant.encoders)
    # Encoders compute in float32 where the range of fp16 would not do.
    in_encoders = "no" if ENCODER_DTYPES[precision] == "float32" else precision

    def size(name: str) -> int:
        own = in_encoders if name in encoders else precision
        return frozen_bytes(plan, name, own, model.components[name].storage)

    moments = [[name] for name in encoders if name != decoder] + stages
    present = [[name for name in moment if name in model.components] for moment in moments]
    return {" and ".join(names): sum(map(size, names)) for names in present if names}


def weights_fit(generation: Generation) -> bool:
    """Return whether the weights fit in `gpu_memory`, if that is given."""
    asked = generation.parameters.gpu_memory
    return not asked or max(weights_at_once(generation).values()) < memory_bytes(asked)
