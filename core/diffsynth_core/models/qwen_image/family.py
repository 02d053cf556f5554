"""Implementation of the family Qwen-Image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.models import control, schedulers
from diffsynth_core.models.family import Encoded, Family
from diffsynth_core.models.qwen_image import components as building
from diffsynth_core.models.qwen_image import encode, forward
from diffsynth_core.models.qwen_image import tiny as rehearsal
from diffsynth_core.models.qwen_image.sampling import SCHEDULER
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import ComponentFiles, Shapes, Variant
from diffsynth_core.models.video_vae import decode_normalized


class QwenImage(Family):
    """Each method calls the module of its name."""

    facts = QWEN_IMAGE
    encoders = encode.ENCODERS

    def config_of(self, files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
        return building.config_of(files, shapes)

    def build(self, component: str, config: Mapping[str, Any]) -> nn.Module:
        return building.build(component, config)

    def load_tokenizer(self, parameter: str, folder: Path) -> Any:
        return building.load_processor(folder) if parameter == "processor_path" else building.load_tokenizer(folder)

    def blank_encoding(self, variant: Variant, denoiser: Any, sizes: StepSizes) -> Encoded:
        return forward.blank_encoding(variant, denoiser, sizes)

    def collate(self, encoded: Sequence[Encoded]) -> Encoded:
        return forward.collate(encoded)

    def sigmas(self, steps: int = TRAINING_TIMESTEPS) -> Tensor:
        return forward.sigmas(steps)

    def predict_velocity(self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batch: Encoded) -> Tensor:
        return forward.predict_velocity(components["dit"], noisy, sigma, batch, components.get(control.CONTROLNET))

    def shared_by_prompts(
        self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batch: Encoded
    ) -> dict[str, Any]:
        controlnet = components.get(control.CONTROLNET)
        if controlnet is None:
            return {}
        return {control.CONTROL_OUTPUTS: forward.control_outputs(controlnet, noisy, sigma, batch)}

    def scheduler(self, variant: Variant, steps: int, shape: Sequence[int]) -> Any:
        *_, height, width = shape
        return schedulers.euler(SCHEDULER, steps, schedulers.token_shift(height // 2 * (width // 2), SCHEDULER))

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return forward.rescale_tokens(super().guide(positive, negative, scale), positive)

    def negative_encoding(self, positive: Encoded, negative: Encoded) -> Encoded:
        return control.with_negative_prompt(positive, negative)

    def decode(self, components: Mapping[str, Any], latents: Tensor) -> Tensor:
        return decode_normalized(components["vae"], latents)

    def write_tiny_weights(self, base: Path, component: str, model_id: str, pattern: str) -> None:
        rehearsal.write_tiny_weights(base, component, model_id, pattern)
