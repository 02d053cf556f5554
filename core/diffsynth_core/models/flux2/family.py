"""Implementation of the family FLUX.2."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.models import schedulers
from diffsynth_core.models.family import Encoded, Family
from diffsynth_core.models.flux2 import components as building
from diffsynth_core.models.flux2 import encode, forward
from diffsynth_core.models.flux2 import tiny as rehearsal
from diffsynth_core.models.flux2.sampling import SCHEDULER, empirical_shift
from diffsynth_core.models.flux2.spec import FLUX2
from diffsynth_core.models.patches import stack_samples
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import ComponentFiles, Shapes, Variant


class Flux2(Family):
    """Each method calls the module of its name."""

    facts = FLUX2
    encoders = encode.ENCODERS

    def config_of(self, files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
        return building.config_of(files, shapes)

    def build(self, component: str, config: Mapping[str, Any]) -> nn.Module:
        return building.build(component, config)

    def load_tokenizer(self, parameter: str, folder: Path) -> Any:
        return building.load_tokenizer(folder)

    def blank_encoding(self, variant: Variant, denoiser: Any, sizes: StepSizes) -> Encoded:
        return forward.blank_encoding(denoiser, sizes)

    def collate(self, encoded: Sequence[Encoded]) -> Encoded:
        return stack_samples(encoded)

    def sigmas(self, steps: int = TRAINING_TIMESTEPS) -> Tensor:
        return forward.sigmas(steps)

    def predict_velocity(self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batch: Encoded) -> Tensor:
        return forward.predict_velocity(components["dit"], noisy, sigma, batch)

    def scheduler(self, variant: Variant, steps: int, shape: Sequence[int]) -> Any:
        *_, height, width = shape
        return schedulers.euler(SCHEDULER, steps, empirical_shift(height * width, steps))

    def decode(self, components: Mapping[str, Any], latents: Tensor) -> Tensor:
        return encode.decode(components["vae"], latents)

    def write_tiny_weights(self, base: Path, component: str, model_id: str, pattern: str) -> None:
        rehearsal.write_tiny_weights(base, component, model_id, pattern)
