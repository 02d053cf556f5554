"""The interface of a model family: the methods that the engine calls."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_core.config.choices import COMPUTE_DTYPES, ENCODER_DTYPES, TRAINING_TIMESTEPS
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import ComponentFiles, EncoderFacts, FamilyFacts, Shapes, Variant
from diffsynth_core.models.tokens import Tokens

Encoded = dict[str, Tensor]
"""The encodings of one sample, by name, without a batch dimension; floating-point."""


@dataclass(frozen=True)
class Encoder:
    """What an encoder does; `EncoderFacts` of the same name in the family's variants state the rest without torch.

    Attributes:
        encode: (facts, components, value of each of its columns) -> encodings of one sample; if `batched`, (facts,
            components, values of each of its columns) -> encodings of each of several samples.
        tokenize: (components, caption) -> the tokens that `encode` takes in its place; None: it takes the caption.
        truncation_warning: about a caption of which `tokenize` ignores a part.
        batched: encodes several samples in one pass, in float32 on a CPU each as it is encoded alone: captions whose
            tokens are of the same group bit for bit, images and clips of the same shapes within rounding (1e-6 for
            video VAEs, 4e-6 for others, whose norms enlarge that of another kernel; neither is nearer to float64).
    """

    encode: Callable[..., Encoded] | Callable[..., list[Encoded]]
    tokenize: Callable[[Mapping[str, Any], str], Tokens] | None = None
    truncation_warning: str = ""
    batched: bool = False


class Family(ABC):
    """A model family.

    In the methods, `components` maps component names to loaded modules, and tokenizer parameters to tokenizers.
    """

    facts: FamilyFacts
    encoders: Mapping[str, Encoder]
    """The encoders of all variants, by name."""

    @abstractmethod
    def config_of(self, files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
        """Return the constructor options of a component, from config.json or inferred from names and shapes in its
        files.

        Raises:
            DiffSynthError: if they cannot be determined.
        """

    @abstractmethod
    def build(self, component: str, config: Mapping[str, Any]) -> nn.Module:
        """Build the module of a component; the caller decides on which device its parameters are created."""

    @abstractmethod
    def load_tokenizer(self, parameter: str, folder: Path) -> Any:
        """Load the tokenizer of a tokenizer parameter, from local files only."""

    def encode(self, encoder: EncoderFacts, components: Mapping[str, Any], sample: Mapping[str, Any]) -> Encoded:
        """Apply one encoder to one sample.

        Args:
            sample: the encoder's columns: the caption as a string, the target as `[3, F, H, W]` float32 in [-1, 1],
                the files of a condition as a list of such: images with F = 1, masks with one channel, clips with
                the frames of the target.
        """
        (encoded,) = self.encode_batch(encoder, components, [self.tokenize(encoder, components, sample)])
        return encoded

    def tokenize(
        self, encoder: EncoderFacts, components: Mapping[str, Any], sample: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return a sample with the tokens of its caption in place of it, if the encoder takes those."""
        tokenize, column = self.encoders[encoder.name].tokenize, self.facts.text_column
        return {**sample, column: tokenize(components, sample[column])} if tokenize else sample

    def encode_batch(
        self, encoder: EncoderFacts, components: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> list[Encoded]:
        """Apply one encoder to several samples, whose images and clips have the same shapes, and whose captions have
        tokens of the same group.

        They are encoded in one pass if the encoder is `batched`, else one after the other.

        Args:
            samples: as `encode` takes them, but as `tokenize` returns them.
        """
        function = self.encoders[encoder.name]
        columns = [[sample[column] for sample in samples] for column in encoder.columns]
        if function.batched:
            return function.encode(encoder, components, *columns)  # type: ignore[return-value]
        return [function.encode(encoder, components, *values) for values in zip(*columns, strict=True)]  # type: ignore[misc]

    def truncation_warning(self, encoder: EncoderFacts, sample: Mapping[str, Any]) -> str | None:
        """Return a warning about the part of a caption that an encoder ignores; None if it reads all of it.

        Args:
            sample: as `tokenize` returns it.
        """
        caption = sample.get(self.facts.text_column)
        truncated = isinstance(caption, Tokens) and caption.truncated
        return self.encoders[encoder.name].truncation_warning if truncated else None

    @abstractmethod
    def blank_encoding(self, variant: Variant, denoiser: Any, sizes: StepSizes) -> Encoded:
        """Return encodings of one sample of these sizes, in shape and dtype; their values are undefined."""

    @abstractmethod
    def collate(self, encoded: Sequence[Encoded]) -> Encoded:
        """Combine encoded samples of one shape into a batch; shorter texts are padded and masked.

        `latents` is `[B, C, F, H, W]`; `given`, if some latents stay clean, is their mask, `[B, 1, F, 1, 1]`.
        """

    @abstractmethod
    def sigmas(self, steps: int = TRAINING_TIMESTEPS) -> Tensor:
        """Return the sigmas of a sampler with this number of steps, without the final 0: `[steps]` float32,
        descending.

        With 1000 steps they are those of training.
        """

    @abstractmethod
    def predict_velocity(self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batch: Encoded) -> Tensor:
        """Predict noise - latents.

        Args:
            noisy: x_t, `[B, C, F, H, W]` float32; clean latents are unchanged in it.
            sigma: `[B]` float32 in (0, 1].
            batch: the output of `collate`.

        Returns:
            `[B, C, F, H, W]`.
        """

    def shared_by_prompts(
        self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batch: Encoded
    ) -> dict[str, Any]:
        """Return what `predict_velocity` would compute alike for the prompt and the negative prompt of a sample.

        Added to either batch, it is not computed again.
        """
        return {}

    @abstractmethod
    def scheduler(self, variant: Variant, steps: int, shape: Sequence[int]) -> Any:
        """Return the published sampler, a scheduler of diffusers, with its timesteps set as in the model's pipeline.

        Args:
            shape: of the latents, `[B, C, F, h, w]`: the number of tokens may shift the sigmas.
        """

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Return the velocity with classifier-free guidance, from those of the two prompts, `[B, C, F, h, w]` float32.

        negative + scale (positive - negative): equation 6 of https://arxiv.org/abs/2207.12598 with w = scale - 1.
        """
        return negative + scale * (positive - negative)

    def negative_encoding(self, positive: Encoded, negative: Encoded) -> Encoded:
        """Return the encodings of a sample with the negative prompt.

        Args:
            positive: of the sample with its prompt.
            negative: by those encoders that read the prompt, of the negative one.
        """
        return {**positive, **negative}

    @abstractmethod
    def decode(self, components: Mapping[str, Any], latents: Tensor) -> Tensor:
        """Return the images or clips of latents as `collate` batches them, the inverse of the target's encoder.

        Args:
            latents: `[B, C, F', h, w]` float32.

        Returns:
            `[B, 3, F, H, W]` float32 in [-1, 1].
        """

    def checkpoint_gradients(
        self, component: str, module: nn.Module, function: Callable[..., Any] | None = None
    ) -> None:
        """Enable gradient checkpointing in a component, if its class supports it: diffusers' video VAEs do not.

        Each block is recomputed as a whole.

        Args:
            function: of a denoiser: calls a block, (block, inputs) -> outputs, and repeats it in the backward pass;
                None: that of torch.
        """
        from diffusers.models.modeling_utils import ModelMixin
        from transformers import PreTrainedModel

        if isinstance(module, PreTrainedModel):
            # transformers recomputes in train mode only; without dropout, train mode changes nothing else.
            module.activation_checkpointing_enable({"use_reentrant": False})
            module.train()
        elif isinstance(module, ModelMixin):
            with suppress(ValueError):  # raised by classes without support
                module.enable_gradient_checkpointing(function)

    @abstractmethod
    def write_tiny_weights(self, base: Path, component: str, model_id: str, pattern: str) -> None:
        """Write a tiny random component of the same architecture, in the real file layout, below `base`/`model_id`.

        `pattern` is the glob of the recipe, such as `transformer/diffusion_pytorch_model*.safetensors`; configuration
        and tokenizer are written too.
        """


def name_references(encoded: Sequence[Tensor], name: str, count: int) -> list[Encoded]:
    """Return the encodings of each of `count` samples, from those of their first, second … reference images.

    Args:
        name: of an encoding, with its number from 0 in place of `{}`.
    """
    return [{name.format(number): images[index] for number, images in enumerate(encoded)} for index in range(count)]


def encoder_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of frozen encoders: that of the run, but float32 for fp16, whose range they exceed."""
    dtype: torch.dtype = getattr(torch, ENCODER_DTYPES[mixed_precision])
    return dtype


def frozen_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of frozen weights and of the computation."""
    dtype: torch.dtype = getattr(torch, COMPUTE_DTYPES[mixed_precision])
    return dtype
