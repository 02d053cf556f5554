"""What encoders of the published VAEs hold at their fullest, counted on modules of diffusers without numbers."""

from functools import partial
from typing import Any
from weakref import finalize

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.size_facts import LatentFacts

WITHIN = 0.1
BYTES = 2
BLOCKS = 4
FLUX = partial(
    AutoencoderKL,
    down_block_types=("DownEncoderBlock2D",) * BLOCKS,
    up_block_types=("UpDecoderBlock2D",) * BLOCKS,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
WAN_2_2 = partial(
    AutoencoderKLWan,
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[0.0] * 48,
    latents_std=[1.0] * 48,
)
"""The configurations that the models are published with; those of the other classes are their defaults."""


class Fullest(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each memory once, apart from `weights`; keeps the most.

    Of tensors without numbers (on the device `meta`), so that images may be of any size.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.alive, self.weights, self.most = {}, weights, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            memory = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if memory is not None and memory._cdata not in self.alive.keys() | self.weights:
                self.alive[memory._cdata] = memory.nbytes()
                finalize(memory, self.alive.pop, memory._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return result


def measure(vae: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes at the fullest moment of encoding pixels of this shape."""
    weights = {weight.untyped_storage()._cdata for weight in vae.parameters()}
    pixels = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Fullest(weights) as fullest:
        vae.encode(pixels)
    return fullest.most


@pytest.mark.filterwarnings("ignore:There are modules in")
@pytest.mark.parametrize(
    ("family", "build", "factor", "frames"),
    [
        ("flux", FLUX, 8, 1),
        ("flux2", AutoencoderKLFlux2, 8, 1),
        ("qwen-image", AutoencoderKLQwenImage, 8, 1),
        *(("wan", AutoencoderKLWan, 8, frames) for frames in (1, 9, 33)),
        *(("wan", WAN_2_2, 16, frames) for frames in (1, 9, 33)),
    ],
)
def test_the_estimate_is_what_an_encoder_holds(family, build, factor, frames):
    with torch.device("meta"):
        vae = build().to(torch.bfloat16).eval()
    height, width = 96, 128  # attention on this device is that of no GPU: small enough that it does not count
    pixels = (1, 3, height, width) if "flux" in family else (1, 3, frames, height, width)
    latents = LatentFacts(channels=16, factor=factor)
    numbers = FAMILIES[family].memory.encoding_numbers(latents, (frames, height, width))
    assert BYTES * numbers == pytest.approx(measure(vae, pixels), rel=WITHIN)
