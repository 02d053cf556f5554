"""Photographs as targets and reference images, and how a run preprocesses them."""

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def photograph(name: str) -> Image.Image:
    """Return a photograph at its original size; `upright` is higher than wide."""
    if name == "upright":
        return photograph("chelsea").crop((120, 0, 300, 300))
    return Image.fromarray(getattr(skimage.data, name)()[..., :3])


def pixels_of(medium: Image.Image | np.ndarray) -> Tensor:
    """Convert an image or the frames of a clip, `[F, H, W, 3]` uint8, to `[3, F, H, W]` float32 in [-1, 1].

    Channels come last in memory, as in the pipelines: convolutions round differently in another memory layout.
    """
    array = np.asarray(medium)
    frames = torch.tensor(array.reshape(-1, *array.shape[-3:]))
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1
