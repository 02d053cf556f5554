"""What a component's forward pass multiplies: which tokens meet which layers, and which attend to which. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffsynth_core.models.size_facts import MediaSize, StepSizes

if TYPE_CHECKING:
    from diffsynth_core.data.conditions import TargetSpec
    from diffsynth_core.models.spec import Variant

Tokens = Mapping[str, int]
"""Kind of tokens -> how many of them a sample has."""
IMAGE, TEXT, JOINT, SHOWN, SAMPLE = "image", "text", "joint", "shown", "sample"
"""Kinds of tokens: of target and references, of the text, of both, of images that an encoder read; and the one vector
of a sample: time, guidance, pooled text."""


@dataclass(frozen=True)
class Attention:
    """An attention of tokens to tokens.

    Attributes:
        layer: pattern (fnmatch) of the module key of a linear layer with as many outputs as all heads have together.
    """

    layer: str
    queries: str
    keys: str


@dataclass(frozen=True)
class ForwardWork:
    """Work of a forward pass.

    Attributes:
        tokens: function from variant and micro-batch to the tokens of one sample.
        layers: pattern (fnmatch) of module keys -> the tokens that these layers read; the first match counts.
        divided: kinds of tokens that processes which compute a sample together divide among them.
    """

    tokens: Callable[["Variant", StepSizes], Tokens]
    layers: Mapping[str, str]
    attentions: tuple[Attention, ...]
    divided: tuple[str, ...] = ()

    def of_process(self, tokens: Tokens, processes: int) -> Tokens:
        """Return how many tokens each of several processes has that compute a sample together, at most."""
        return {kind: -(-count // processes) if kind in self.divided else count for kind, count in tokens.items()}


def count_image_tokens(image: MediaSize, target: "TargetSpec") -> int:
    """Return the tokens of an image or clip."""
    frames, height, width = image
    latent_frames = (frames - 1) // target.frame_step + 1
    return latent_frames * (height // target.size_factor) * (width // target.size_factor)


def joint_tokens(variant: "Variant", sizes: StepSizes, text: int) -> Tokens:
    """Return the tokens of a transformer that reads target, references and text together."""
    image = sum(count_image_tokens(image, variant.target) for image in sizes.images)
    return {IMAGE: image, TEXT: text, JOINT: image + text, SAMPLE: 1}
