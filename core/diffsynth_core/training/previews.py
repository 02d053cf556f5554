"""Previews: images of fixed prompts, drawn from fixed noise with the weights in training, or with their averages."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffsynth_core.checkpoints.run_folder import PREVIEWS, PreviewImage, PreviewList, preview_folder
from diffsynth_core.errors import Interrupted
from diffsynth_core.files import TEMPORARY_SUFFIX
from diffsynth_core.generation.encoding import EncodedJob, encode_jobs
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.generation.outputs import FileFacts, details, parameter_text, save_pixels
from diffsynth_core.generation.sampling import Sampler, as_uint8, batch_of, decode_pixels, start_sampler
from diffsynth_core.models.family import Encoded, Family, encoder_dtype
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.model.loading import free_device_memory, load_planned
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, SilentReporter
from diffsynth_core.stop import StopRequest, interrupted_before_first_step
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.model import SamplingStep, TrainingModule


def generation_plan(plan: RunPlan, accelerator: Accelerator) -> GenerationPlan:
    """Return the previews of a run as what this process would generate."""
    return GenerationPlan(
        model=plan.model,
        machine=replace(plan.machine, device=str(accelerator.device)),
        jobs=plan.previews,
        cache=plan.output.cache,
        max_pixels=plan.parameters.max_pixels,
    )


def encode_previews(
    plan: RunPlan, family: Family, accelerator: Accelerator, reporter: Reporter, stop: StopRequest
) -> list[EncodedJob]:
    """Encode the prompts and images of the previews; on each machine one process does, and the others read.

    Raises:
        DiffSynthError: if an image cannot be read, or an encoding contains NaN or Inf.
        Interrupted: in all processes, if a stop of one of them is requested; finished encodings are kept.
    """
    encoded: list[EncodedJob] = []
    if not plan.previews:
        return encoded
    interrupted = torch.zeros((), device=accelerator.device)
    for encodes in (True, False):
        if accelerator.is_local_main_process == encodes:
            try:
                encoded = encode_jobs(generation_plan(plan, accelerator), family, reporter, stop)
            except Interrupted:
                interrupted += 1
        # Not the barriers of accelerate, which a process that is interrupted would not reach.
        if accelerator.reduce(interrupted, "sum") > 0:
            raise interrupted_before_first_step(stop.signal_number or signal.SIGTERM)
    return encoded


class NotPrepared(Exception):
    """What a process needs to draw cannot be read or built; raised in all of them, before any of them samples."""


class Previews:
    """Draws the previews of a run; all processes call it together.

    What fails here does not end the run, but for one thing: if sampling fails in one of several processes, the others
    wait for it in the midst of a step of the model, so the error is raised.
    """

    def __init__(
        self,
        plan: RunPlan,
        encoded: Sequence[EncodedJob],
        model: TrainingModule,
        engine: Engine,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        """`encoded`: of `encode_previews`."""
        self._folder, self._encoded = plan.parameters.output_path, encoded
        self._plan = generation_plan(plan, accelerator)
        self._compiled, self._machine = plan.parameters.compile, plan.machine
        self._of_averages = plan.parameters.evaluate_ema
        self._family = load_family(plan.model.facts.name)
        self._denoiser = model.components[plan.model.facts.denoiser]
        self._engine, self._accelerator, self._reporter = engine, accelerator, reporter
        self._gave_up = False

    def draw(self, step: int, must_end: Callable[[], bool]) -> Path | None:
        """Draw all previews after `step` steps.

        Args:
            must_end: whether this process has to end the run; asked after each sampling step, and before decoding.

        Returns:
            The folder with their files, in the main process; None in the others, or if a process had to end the run
            meanwhile, or if this has failed.

        Raises:
            Exception: whatever fails in the steps of sampling, with several processes.
        """
        if self._gave_up:
            return None
        latents, folder, failure = None, None, ""
        try:
            with self._engine.averaged() if self._of_averages else nullcontext():
                latents = self._sample(must_end)
            if latents is not None and self._accelerator.is_main_process and not must_end():
                folder = self._write(step, latents)
        except Exception as error:
            if self._machine.world_size > 1 and latents is None and not isinstance(error, NotPrepared):
                raise
            failure = " ".join(str(error).split()) or type(error).__name__
        del latents
        free_device_memory(self._accelerator.device)
        self._gave_up = self._any(bool(failure))
        if failure:
            self._reporter.warn(f"no previews after step {step}: {failure}; the run continues without previews")
        return folder

    def _any(self, own: bool) -> bool:
        """Return whether something is true in any process."""
        return bool(self._engine.sum_over_processes(torch.tensor(float(own), device=self._accelerator.device)) > 0)

    def _sample(self, must_end: Callable[[], bool]) -> list[Tensor] | None:
        """Return the latents of each job, `[1, C, F, h, w]` on the host; None if any process has to end the run.

        Processes sample different jobs, but for those that compute a sample together. All have the same steps and
        shapes; where none is left, the first of the round stands in for one.
        """
        jobs, share = self._plan.jobs, self._machine.share(self._accelerator.process_index)
        found: list[Tensor] = []
        for start in range(0, len(jobs), self._machine.data_parallel):
            is_left = start + share < len(jobs)
            latents = self._sample_one(start + share if is_left else start, must_end)
            if latents is None:
                return None
            of_round = torch.zeros(self._machine.data_parallel, *latents.shape, device=latents.device)
            if is_left and self._machine.counts(self._accelerator.process_index):
                of_round[share] = latents
            of_round = self._engine.sum_over_processes(of_round).cpu()
            found += of_round[: len(jobs) - start]
        return found

    def _sample_one(self, number: int, must_end: Callable[[], bool]) -> Tensor | None:
        """Return the latents of a job, `[1, C, F, h, w]`; None if any process has to end the run.

        Raises:
            NotPrepared: in all processes, if one of them cannot begin.
        """
        prepared, failure = None, None
        try:
            prepared = self._prepare(number)
        except Exception as error:
            failure = error
        if self._any(failure is not None) or prepared is None:
            reason = " ".join(str(failure).split()) or type(failure).__name__
            raise NotPrepared(reason if failure else "another process cannot begin to draw") from failure
        sampler, steps = prepared
        with self._eager():
            for _ in steps:
                if self._any(must_end()):
                    return None
        return sampler.latents

    def _prepare(self, number: int) -> tuple[Sampler, Iterator[None]]:
        """Return the sampler of a job, and its steps, none of which has been taken."""
        job, model, device = self._plan.jobs[number], self._plan.model, self._accelerator.device
        sampler = start_sampler(self._family, model.variant, self._denoiser, job, device)
        positive, negative = self._encoded[number].read(self._family)
        steps = sampler.denoise(
            self._predict,
            batch_of(self._family, positive, job, device),
            batch_of(self._family, negative, job, device) if negative else None,
            job.cfg_scale,
        )
        return sampler, steps

    def _predict(self, noisy: Tensor, sigma: Tensor, batches: Sequence[Encoded]) -> list[Tensor]:
        return list(self._engine.evaluate(SamplingStep(noisy, sigma, tuple(batches))))

    def _eager(self) -> AbstractContextManager[object]:
        """Run compiled blocks as they are: their shapes and the lack of gradients would be compiled for themselves."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def _write(self, step: int, latents: Sequence[Tensor]) -> Path:
        """Decode latents, one job after the other, with a VAE that is loaded for it, and write the files.

        Raises:
            DiffSynthError: if the VAE cannot be read, or a file cannot be written.
            torch.OutOfMemoryError: if the device has not enough memory for the VAE.
        """
        folder = preview_folder(self._folder, step)
        (self._folder / PREVIEWS).mkdir(exist_ok=True)  # not with parents: the folder of the run may have been renamed
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):  # of a run that was killed while writing
            leftover.unlink(missing_ok=True)
        PreviewList(step, tuple(self._images(folder, step, latents))).save(folder)
        self._reporter.info(f"Drew the previews after step {step} in `{folder}`")
        return folder

    def _images(self, folder: Path, step: int, latents: Sequence[Tensor]) -> Iterator[PreviewImage]:
        model, device = self._plan.model, self._accelerator.device
        precision, decoder = self._plan.machine.mixed_precision, model.variant.decoder
        files = FileFacts(self._plan, SilentReporter())
        vae = load_planned(model, self._family, decoder, encoder_dtype(precision), device, SilentReporter())
        for number, (job, of_job) in enumerate(zip(self._plan.jobs, latents, strict=True), 1):
            if not bool(of_job.isfinite().all()):
                what = f"preview {number} after step {step}: the predictions of the {model.facts.denoiser} contain"
                self._reporter.warn(f"{what} NaN or Inf, so it is not drawn")
                continue
            pixels = as_uint8(decode_pixels(self._family, {decoder: vae}, of_job.to(device)))
            name = f"{number:04}{'.mp4' if job.num_frames > 1 else '.png'}"
            facts = {**details(job, self._plan, files), "step": step}
            save_pixels(
                folder / name, pixels, model.variant.sampling.fps, parameter_text(job, model.variant.title), facts
            )
            yield PreviewImage(name, job.prompt, job.seed, job.height, job.width, job.num_frames)
