"""What one model generates. No torch."""

from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.planning.drawing.jobs import GenerationJob
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.plan import Machine


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What a command generates, or a run while it trains.

    Attributes:
        model: of a model with two denoisers, its components may contain the second one as the family's
            `second_denoiser`; without it the first one draws all steps.
        cache: folder of encodings and file hashes.
        max_pixels: maximum area of reference images in pixels, as in training.
    """

    model: ModelPlan
    machine: Machine
    jobs: tuple[GenerationJob, ...]
    cache: Path
    max_pixels: int = 1024 * 1024
