"""Generating: prompts and images are encoded, the denoiser samples latents, the VAE decodes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffsynth_core.errors import DiffSynthError, Interrupted
from diffsynth_core.generation.encoding import EncodedJob, encode_jobs
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.generation.loras import lora_setup, merged_differences, set_loras
from diffsynth_core.generation.sampling import (
    Sampler,
    as_uint8,
    batch_of,
    decode_pixels,
    predict_velocities,
    start_sampler,
)
from diffsynth_core.models.family import Encoded, encoder_dtype, frozen_dtype
from diffsynth_core.models.loading import WeightChange
from diffsynth_core.models.prepare import FROZEN, ComponentSetup
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.drawing.jobs import AppliedLora, GenerationJob
from diffsynth_core.planning.model.loading import drop, load_planned
from diffsynth_core.progress import Reporter
from diffsynth_core.stop import StopRequest


def generate(
    plan: GenerationPlan, reporter: Reporter, stop: StopRequest
) -> Iterator[tuple[GenerationJob, NDArray[np.uint8]]]:
    """Yield each job with its pixels, `[F, H, W, 3]` RGB, in the order of the plan, as soon as it is generated.

    All prompts and images are encoded first, by one encoder component after the other, from the cache where it has
    them; then the denoiser is loaded, and the VAE beside it. Of two denoisers, the first draws its part of all jobs
    before the second is loaded.

    Raises:
        DiffSynthError: if an image cannot be read, or encodings or latents contain NaN or Inf.
        Interrupted: if a stop is requested; between steps.
    """
    for job, pixels in draw(plan, reporter, stop):
        yield job, as_uint8(pixels)


@dataclass(frozen=True)
class _Stage:
    """The steps of one denoiser: those with a sigma of at least `boundary`."""

    denoiser: str
    boundary: float
    is_second: bool = False

    def cfg_scale(self, job: GenerationJob) -> float:
        if self.is_second and job.second_cfg_scale is not None:
            return job.second_cfg_scale
        return job.cfg_scale


def draw(plan: GenerationPlan, reporter: Reporter, stop: StopRequest) -> Iterator[tuple[GenerationJob, Tensor]]:
    """Yield each job with its pixels, `[3, F, H, W]` float32 in [0, 1]; otherwise as `generate`."""
    drawing = _Drawing(plan, reporter, stop)
    encoded = encode_jobs(plan, drawing.family, reporter, stop)
    *_, last = stages = _stages(plan, reporter)
    for stage in stages:
        components = drawing.load_step(stage.denoiser)
        if stage is last:
            components |= drawing.load_decoder()
        for number, job in enumerate(plan.jobs):
            drawing.advance(components, stage, number, encoded[number])
            if stage is last:
                yield job, drawing.finish(components, number)
        drop(components, drawing.device)


def _stages(plan: GenerationPlan, reporter: Reporter) -> list[_Stage]:
    facts, variant = plan.model.facts, plan.model.variant
    boundary = variant.sampling.boundary
    if boundary is None or facts.second_denoiser not in plan.model.components:
        if boundary is not None:
            what = "one of the two transformers of this model draws all steps, including those of the other"
            reporter.warn(f"{what} (on either side of sigma {boundary:g})")
        return [_Stage(facts.denoiser, 0.0)]
    return [_Stage(facts.denoiser, boundary), _Stage(facts.second_denoiser, 0.0, is_second=True)]


class _Drawing:
    """The jobs of a plan, and how far each of them is."""

    def __init__(self, plan: GenerationPlan, reporter: Reporter, stop: StopRequest) -> None:
        self.family = load_family(plan.model.facts.name)
        self.device = torch.device(plan.machine.device)
        self._plan, self._reporter, self._stop = plan, reporter, stop
        self._precision = plan.machine.mixed_precision
        self._samplers: dict[int, Sampler] = {}
        self._active: dict[str, tuple[AppliedLora, ...]] = {}
        """Component -> LoRAs that its module has now; none before it carries any."""

    def load_step(self, denoiser: str) -> dict[str, nn.Module]:
        """Load a denoiser, and what else runs in its steps; either of two denoisers is the family's `denoiser`."""
        model = self._plan.model
        files = {model.facts.denoiser: denoiser, **{name: name for name in model.variant.step_components}}
        self._active = {}
        return {name: self._load_with_loras(component) for name, component in files.items()}

    def _load_with_loras(self, component: str) -> nn.Module:
        """Load a component that carries the LoRAs of all jobs, and none of them yet."""
        jobs, public_keys = self._plan.jobs, self._plan.model.components[component].layout.public_keys
        setup = lora_setup(jobs, component, public_keys)
        with merged_differences(jobs[0].adapters, component, public_keys) as change:
            module = self._load(component, frozen_dtype(self._precision), setup, change)
        if setup.lora_modules:
            self._active[component] = ()
        return module

    def _set_loras(self, components: Mapping[str, Any], stage: "_Stage", job: GenerationJob) -> None:
        """Set the LoRAs of a job where the module has others."""
        model = self._plan.model
        for component in self._active:
            if self._active[component] != job.adapters:
                module = components[model.facts.denoiser if component == stage.denoiser else component]
                set_loras(module, job.adapters, component, model.components[component].layout.public_keys)
                self._active[component] = job.adapters

    def load_decoder(self) -> dict[str, nn.Module]:
        """Load the component that decodes latents."""
        decoder = self._plan.model.variant.decoder
        return {decoder: self._load(decoder, encoder_dtype(self._precision))}

    def _load(
        self,
        component: str,
        dtype: torch.dtype,
        setup: ComponentSetup = FROZEN,
        change: WeightChange | None = None,
    ) -> nn.Module:
        self._raise_if_stopped()
        model = self._plan.model
        return load_planned(
            model, self.family, component, dtype, self.device, self._reporter, setup=setup, change=change
        )

    def advance(self, components: Mapping[str, Any], stage: _Stage, number: int, encodings: EncodedJob) -> None:
        """Take the steps of a stage in a job.

        Raises:
            Interrupted: if a stop is requested before the last step.
        """
        job, jobs = self._plan.jobs[number], len(self._plan.jobs)
        if number not in self._samplers:
            model = self._plan.model
            denoiser = components[model.facts.denoiser]
            self._samplers[number] = start_sampler(self.family, model.variant, denoiser, job, self.device)
        sampler = self._samplers[number]
        self._set_loras(components, stage, job)
        positive, negative = encodings.read(self.family)
        cfg_scale = stage.cfg_scale(job)
        steps = sampler.denoise(
            partial(self._predict, components),
            batch_of(self.family, positive, job, self.device),
            batch_of(self.family, negative, job, self.device) if negative and cfg_scale > 1 else None,
            cfg_scale,
            stage.boundary,
        )
        total = sampler.steps_above(stage.boundary)
        with self._reporter.task(f"Generating {number + 1} of {jobs}", total, "steps") as task:
            self._raise_if_stopped()
            for _ in steps:
                task.advance()
                if sampler.steps_above(stage.boundary):
                    self._raise_if_stopped()

    def _predict(
        self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batches: Sequence[Encoded]
    ) -> list[Tensor]:
        dtype, enabled = frozen_dtype(self._precision), self._precision != "no"
        with torch.autocast(self.device.type, dtype, enabled=enabled):
            return predict_velocities(self.family, components, noisy, sigma, batches)

    def _raise_if_stopped(self) -> None:
        if self._stop.signal_number is not None:
            raise Interrupted(self._stop.signal_number, "interrupted; finished images are kept")

    def finish(self, components: Mapping[str, Any], number: int) -> Tensor:
        """Return the pixels of a job after its last step, `[3, F, H, W]` in [0, 1].

        Raises:
            DiffSynthError: if its latents contain NaN or Inf.
        """
        latents = self._samplers.pop(number).latents
        if not bool(latents.isfinite().all()):
            raise DiffSynthError(
                f"the predictions of the {self._plan.model.facts.denoiser} contain NaN or Inf",
                "check its files and LoRAs, or pass `--mixed_precision bf16` or `no`",
            )
        return decode_pixels(self.family, components, latents)
