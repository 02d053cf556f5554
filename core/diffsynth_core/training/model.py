"""What trains: the loaded components with their LoRA, and the loss of a micro-batch."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.lora import load_lora
from diffsynth_core.adapters.swap import swaps_of
from diffsynth_core.adapters.tensors import Place, Whole, as_is, place
from diffsynth_core.generation.sampling import predict_velocities
from diffsynth_core.host_memory import to_device
from diffsynth_core.models.compilation import compile_blocks
from diffsynth_core.models.family import Encoded, Family, frozen_dtype
from diffsynth_core.models.loading import stored_dtypes
from diffsynth_core.planning.data.encoder_inputs import load_tokenizers, scale_pixels
from diffsynth_core.planning.memory.activations import component_setup
from diffsynth_core.planning.memory.block_swap import trained_blocks
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, pluralize
from diffsynth_core.training.activations import OffloadActivations
from diffsynth_core.training.context_parallel import divide_tokens
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.loading import load_for_run
from diffsynth_core.training.objective import SampleDraw
from diffsynth_core.training.objectives import make_objective
from diffsynth_core.training.trained_swap import TrainedSwap


@dataclass(frozen=True)
class SamplingStep:
    """What a sampling step asks of the denoiser.

    Attributes:
        noisy: latents `[1, C, F, h, w]` float32.
        sigma: `[1]` float32.
        batches: with the prompt and, with guidance, with the negative one, as `collate` returns them, on the device.
    """

    noisy: Tensor
    sigma: Tensor
    batches: tuple[Encoded, ...]


class TrainingModule(nn.Module):
    """All components that take part in a step, as one module whose forward pass is the loss of each sample of a
    micro-batch, or the velocities of a sampling step.
    """

    def __init__(
        self,
        plan: RunPlan,
        family: Family,
        components: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        trained_swap: TrainedSwap,
        device: torch.device,
    ) -> None:
        """Put together what is loaded; `device`: of the computation, where weights need not be between their uses."""
        super().__init__()
        self.components = nn.ModuleDict(components)
        # Read once: the base files may have moved by the time a checkpoint is written.
        self.stored_dtypes = {name: stored_dtypes(plan.model.components[name]) for name in components}
        self._family = family
        self._parameters_of_run, self._samples = plan.parameters, plan.data.samples.samples
        self._online = tuple(part.encoder for part in plan.encodings.encoders if part.online)
        self._tokenizers = dict(tokenizers)
        self.objective = make_objective(plan, family)
        self._swaps, self.trained_swap, self._device = swaps_of(self.components), trained_swap, device

    def forward(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        """The loss of each sample of a micro-batch, `[B]` float32, or the velocity with each batch of a sampling step,
        `[N, 1, C, F, h, w]`.

        One forward pass for both, because engines gather weights and cast them around it.
        """
        for swap in self._swaps:
            swap.begin(self._device)
        return self._velocities(inputs) if isinstance(inputs, SamplingStep) else self._losses(inputs)

    def _velocities(self, step: SamplingStep) -> Tensor:
        known = self._known()
        return torch.stack(predict_velocities(self._family, known, step.noisy, step.sigma, step.batches))

    def _losses(self, micro_batch: MicroBatch) -> Tensor:
        batch, settings = self._encode(micro_batch), self._parameters_of_run

        def predict(noisy: Tensor, sigma: Tensor) -> Tensor:
            with OffloadActivations() if settings.use_gradient_checkpointing_offload else nullcontext():
                return self._family.predict_velocity(self._known(), noisy, sigma, batch)

        losses: Tensor = self.objective(predict, batch, self._draws(micro_batch))
        return losses

    @torch.no_grad()
    def losses_of_zero(self, micro_batch: MicroBatch) -> Tensor | None:
        """The loss of each sample if each predicted velocity were zero, `[B]` float32; None if an encoder trains."""
        if self._online:
            return None
        losses: Tensor = self.objective(
            lambda noisy, sigma: torch.zeros_like(noisy), self._encode(micro_batch), self._draws(micro_batch)
        )
        return losses

    def _draws(self, micro_batch: MicroBatch) -> list[SampleDraw]:
        seed, epoch, refs = self._parameters_of_run.seed, micro_batch.epoch, micro_batch.refs
        numbers = micro_batch.numbers or [ref.sample for ref in refs]
        return [
            SampleDraw(seed, epoch, number, ref.repeat, self._samples[ref.sample].sampling, micro_batch.band)
            for ref, number in zip(refs, numbers, strict=True)
        ]

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by `<component>.<name>`."""
        return {name: parameter for name, parameter in self.components.named_parameters() if parameter.requires_grad}

    def _encode(self, micro_batch: MicroBatch) -> Encoded:
        """The batch on the device; what encoders in training make is made here, with gradients."""
        device = self._device
        samples = []
        for encoded, raw in zip(micro_batch.encoded, micro_batch.raw, strict=True):
            sample = {name: to_device(tensor, device) for name, tensor in encoded.items()}
            for encoder in self._online:
                sample.update(self._family.encode(encoder, self._known(), scale_pixels(raw[encoder.name], device)))
            samples.append(sample)
        return self._family.collate(samples)

    def _known(self) -> dict[str, Any]:
        return {**dict(self.components.items()), **self._tokenizers}


def build_training_module(
    plan: RunPlan,
    family: Family,
    device: torch.device,
    reporter: Reporter,
    place: Place = place,
    whole: Whole = as_is,
) -> TrainingModule:
    """Load what a step needs: the denoiser, the other step components, and every component that trains.

    Weights that train are float32, LoRA too; the others keep the run's precision. `place` sets each of them, and
    `whole` makes one whole again if it keeps a part.
    """
    training, settings = plan.training, plan.parameters
    components: dict[str, nn.Module] = {}
    tokenizers: dict[str, Any] = {}
    trained_swap = TrainedSwap((), device)
    for name in plan.model.facts.component_names:
        if name not in training.components and name not in (
            plan.model.facts.denoiser,
            *plan.model.variant.step_components,
        ):
            continue
        is_denoiser = name == plan.model.facts.denoiser
        waiting = trained_blocks(plan.model, training, settings.blocks_to_swap) if is_denoiser else ()
        held_on = torch.device("cpu") if plan.machine.engine.offload_weights else device
        load_device = torch.device("cpu") if settings.initialize_model_on_cpu or waiting else held_on
        setup = component_setup(plan, name, plan.model.shapes[name], settings.lora_rank)
        dtype = frozen_dtype(plan.machine.mixed_precision)
        module = load_for_run(plan, family, name, dtype, load_device, reporter, setup, place)
        if waiting:
            trained_swap = TrainedSwap([module.get_submodule(block) for block in waiting], device)
            family.checkpoint_gradients(name, module, trained_swap.checkpoint)
        with trained_swap.left_out():
            module.to(held_on)
        if name == training.lora_component and settings.lora_checkpoint:
            naming, keys = plan.model.facts.component(name).lora_naming, plan.model.components[name].layout.public_keys
            filled = load_lora(module, settings.lora_checkpoint, naming, keys, place, whole)
            reporter.info(
                f"LoRA initialized from `{settings.lora_checkpoint}`: {filled} of {pluralize(len(training.lora_modules), 'module')}"
            )
        if settings.compile and is_denoiser:
            compile_blocks(plan.model.facts.component(name), module)
        if plan.machine.context_parallel > 1 and is_denoiser:
            divide_tokens(module, plan.machine, device, timestep_of_each=plan.model.variant.num_conditioning_frames > 0)
        components[name] = module
        tokenizers.update(load_tokenizers(plan.model, family, name))
    return TrainingModule(plan, family, components, tokenizers, trained_swap, device)
