"""What is generated: jobs, and the plan that has them. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_core.planning.model_plan import ModelPlan
from diffsynth_core.planning.plan import Machine
from diffsynth_core.weights.lora import Lora


@dataclass(frozen=True, kw_only=True)
class AppliedLora:
    """A LoRA that is active in a job.

    Attributes:
        lora: matched to the modules of its component.
        component: the denoiser or, for models with two, the family's `second_denoiser`.
        weight: by which its scale is multiplied.
        shapes: of the component's tensors by public name.
    """

    lora: Lora
    component: str
    weight: float
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """One image or clip.

    Attributes:
        cfg_scale: scale of classifier-free guidance; at 1 the negative prompt is not used.
        guidance: input of the guidance embedder; None for models without one.
        height, width: in pixels, multiples of the target's `size_factor`.
        num_frames: 1 for images; of clips, a multiple of the target's `frame_step` plus one.
        images: extra input (`edit_image`, `controlnet_image`, `input_image`, …) -> its files.
        values: extra input that is a number or a text -> its value.
        second_cfg_scale: `cfg_scale` of the second of two denoisers; None: that of the first.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    cfg_scale: float
    guidance: float | None
    height: int
    width: int
    num_frames: int = 1
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    adapters: tuple[AppliedLora, ...] = ()
    values: Mapping[str, float | str] = field(default_factory=dict)
    second_cfg_scale: float | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Prompts and numbers, for JSON."""
        second = {} if self.second_cfg_scale is None else {"second_cfg_scale": self.second_cfg_scale}
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "steps": self.steps,
            "cfg_scale": self.cfg_scale,
            **second,
            "guidance": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
        }

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt is used."""
        return max(self.cfg_scale, self.second_cfg_scale or 0) > 1


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What a command generates.

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
