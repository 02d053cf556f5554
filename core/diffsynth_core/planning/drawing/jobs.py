"""What is drawn: one job per image or clip. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_core.models.spec import Variant
from diffsynth_core.planning.drawing.prompts import PromptRow
from diffsynth_core.weights.lora import Lora


@dataclass(frozen=True)
class ImageSize:
    """Size of an image or clip in pixels and frames."""

    height: int
    width: int
    num_frames: int = 1


@dataclass(frozen=True)
class SamplingChoice:
    """What is chosen for the sampler; None: the documented default of the model."""

    steps: int | None = None
    cfg_scale: float | None = None
    guidance: float | None = None


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
class JobDefaults:
    """What all jobs of a command have in common.

    Attributes:
        negative_prompt: of prompts without one of their own; None: that of the model.
        images: extra input -> files, for prompts without files of their own.
    """

    variant: Variant
    size: ImageSize
    seed: int
    choice: SamplingChoice = field(default_factory=SamplingChoice)
    negative_prompt: str | None = None
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def cfg_scale(self) -> float:
        """The scale of classifier-free guidance."""
        chosen = self.choice.cfg_scale
        return self.variant.sampling.cfg_scale if chosen is None else chosen

    def job(self, row: PromptRow, number: int, adapters: tuple[AppliedLora, ...] = ()) -> GenerationJob:
        """Return the job of a prompt; `number`: from 0, which is added to the seed."""
        facts, chosen = self.variant.sampling, self.choice
        negative = next(
            text for text in (row.negative_prompt, self.negative_prompt, facts.negative_prompt) if text is not None
        )
        return GenerationJob(
            prompt=row.prompt,
            negative_prompt=negative if self.cfg_scale != 1 else "",
            seed=self.seed + number if row.seed is None else row.seed,
            steps=chosen.steps or facts.steps,
            cfg_scale=self.cfg_scale,
            second_cfg_scale=facts.second_cfg_scale if chosen.cfg_scale is None else None,
            guidance=facts.guidance if chosen.guidance is None else chosen.guidance,
            height=self.size.height,
            width=self.size.width,
            num_frames=self.size.num_frames,
            images={name: files for name, files in {**self.images, **row.images}.items() if files},
            adapters=adapters,
        )
