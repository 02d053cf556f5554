"""Documented defaults for generating with FLUX.1, and its published scheduler. No torch."""

from collections.abc import Mapping
from typing import Any

from diffsynth_core.models.spec import SamplingFacts

SCHEDULER: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""The published scheduler_config.json."""

DEV = SamplingFacts(steps=50, cfg_scale=1.0, guidance=3.5, height=1024, width=1024)
"""Source: the model card of black-forest-labs/FLUX.1-dev."""
KREA = SamplingFacts(steps=28, cfg_scale=1.0, guidance=4.5, height=1024, width=1024)
"""Source: the model card of black-forest-labs/FLUX.1-Krea-dev; steps: `FluxPipeline`."""
KONTEXT = SamplingFacts(steps=28, cfg_scale=1.0, guidance=2.5, height=1024, width=1024)
"""Source: the model card of black-forest-labs/FLUX.1-Kontext-dev; steps: `FluxKontextPipeline`."""
