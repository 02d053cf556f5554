"""The handful of verbs the engine asks of a family."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_core.config.choices import COMPUTE_DTYPES, ENCODER_DTYPES, TRAINING_TIMESTEPS
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import ComponentFiles, EncoderFacts, FamilyFacts, Shapes, Variant, is_below

Encoded = dict[str, Tensor]
"""What the encoders make of one sample, by name, without a batch dimension; floats."""


class Family(ABC):
    """One model family.

    `components` below maps component names to loaded modules, and tokenizer parameters to tokenizers.
    """

    facts: FamilyFacts

    @abstractmethod
    def config_of(self, files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
        """Constructor settings of a component: its config.json, else inferred from names and shapes in its files.

        Raises:
            DiffSynthError: when the files do not tell.
        """

    @abstractmethod
    def build(self, component: str, config: Mapping[str, Any]) -> nn.Module:
        """The module of a component; the caller decides where its parameters live."""

    @abstractmethod
    def load_tokenizer(self, parameter: str, folder: Path) -> Any:
        """The tokenizer that a tokenizer parameter names, from local files only."""

    @abstractmethod
    def encode(self, encoder: EncoderFacts, components: Mapping[str, Any], sample: Mapping[str, Any]) -> Encoded:
        """What one encoder makes of one sample.

        `sample` holds what the encoder's columns name: a caption as text, what is trained on as `[3, F, H, W]` float32
        in [-1, 1], reference images as a list of such with F = 1.
        """

    @abstractmethod
    def blank_encoding(self, variant: Variant, denoiser: Any, sizes: StepSizes) -> Encoded:
        """What the encoders make of one sample of these sizes, in shape and dtype; its values mean nothing."""

    @abstractmethod
    def collate(self, encoded: Sequence[Encoded]) -> Encoded:
        """Encoded samples of one shape -> one batch; what is shorter is padded and masked.

        `latents` is `[B, C, F, H, W]`; `given`, where the model is told some of them clean, `[B, 1, F, 1, 1]`: 1 there.
        """

    @abstractmethod
    def sigmas(self, steps: int = TRAINING_TIMESTEPS) -> Tensor:
        """The sigmas of a sampler of so many steps before its last, 0: `[steps]` float32, most noisy first.

        1000 are those of training.
        """

    @abstractmethod
    def predict_velocity(self, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batch: Encoded) -> Tensor:
        """The model's estimate of noise - latents.

        Args:
            noisy: x_t, `[B, C, F, H, W]` float32; latents that are given stand in it as they are.
            sigma: `[B]` float32 in (0, 1].
            batch: what `collate` made.

        Returns: `[B, C, F, H, W]`.
        """

    @abstractmethod
    def checkpoint_gradients(self, component: str, module: nn.Module) -> None:
        """Make the backward pass of a component recompute its activations."""

    @abstractmethod
    def write_tiny_weights(self, base: Path, component: str, model_id: str, pattern: str) -> None:
        """Write a tiny random component of the same architecture, in the real file layout, below `base`/`model_id`.

        `pattern` is the glob of the recipe, such as `transformer/diffusion_pytorch_model*.safetensors`; what belongs
        beside the weights (config, tokenizer) is written too.
        """

    def truncation_warning(
        self, encoder: EncoderFacts, components: Mapping[str, Any], sample: Mapping[str, Any]
    ) -> str | None:
        """What an encoder leaves out of a sample, as words for a warning; None when it takes all of it."""
        return None

    def unused_parameters(self, component: str, module: nn.Module, variant: Variant) -> frozenset[str]:
        """Names of parameters that no gradient can reach."""
        names = [name for name, _ in module.named_parameters()]
        dead = variant.unused_params(self.facts.component(component), frozenset(names))
        return frozenset(name for name in names if is_below(name, dead))


def encoder_dtype(mixed_precision: str) -> torch.dtype:
    """The dtype of frozen encoders."""
    dtype: torch.dtype = getattr(torch, ENCODER_DTYPES[mixed_precision])
    return dtype


def frozen_dtype(mixed_precision: str) -> torch.dtype:
    """The dtype of frozen weights and of the computation."""
    dtype: torch.dtype = getattr(torch, COMPUTE_DTYPES[mixed_precision])
    return dtype
