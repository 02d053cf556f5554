"""What encoders read, loaded from files, and what they make of it, checked; for training and for generating."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsynth_core.data.media import MediaCrop, load_pixels
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.host_memory import to_device
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.models.family import Encoded, Family
from diffsynth_core.planning.data.encoding_keys import ColumnInput, ConditioningFrames
from diffsynth_core.planning.model.model_plan import ModelPlan

GRAY = 127.5
"""Value of a pixel that is 0 in [-1, 1]."""


def load_input(value: ColumnInput) -> Any:
    """Load what an encoder reads of a column, in the form in which data workers pass it on.

    Returns:
        The caption or value itself; the target as `[3, F, H, W]` uint8; the files of a condition as a list of such.
        A clip of conditioning frames is float32, with the same values and `GRAY`.
    """
    if isinstance(value, MediaCrop):
        return load_pixel_tensor(value)
    if isinstance(value, tuple):
        return [load_pixel_tensor(crop) for crop in value]
    if isinstance(value, ConditioningFrames):
        clip = torch.full((3, *value.shape), GRAY)
        for frame, crop in value.given:
            clip[:, frame] = load_pixel_tensor(crop)[:, 0].float()
        return clip
    return value


def load_pixel_tensor(crop: MediaCrop) -> Tensor:
    """Load an image or clip at its training size, `[3, F, H, W]` uint8, a quarter of the bytes of float32; of a mask
    `[1, 1, H, W]`.
    """
    return torch.from_numpy(np.array(load_pixels(crop).transpose(3, 0, 1, 2), order="C"))  # Pillow's are read-only


def scale_pixels(loaded: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the inputs of an encoder to the device, images and clips as `[3, F, H, W]` float32 in [-1, 1]."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(item) for item in value]
        if isinstance(value, Tensor):
            # Always a copy: conditioning frames are float32 already, and may be in a batch several times.
            return to_device(value, device).to(torch.float32, copy=True).div_(127.5).sub_(1)
        return value

    return {name: scaled(value) for name, value in loaded.items()}


def check_encoded(encoded: Encoded, component: str, name: str, files: Iterable[Path], hashes: HashCache) -> None:
    """Reject encodings that must not enter the cache, from where they would be reused.

    Args:
        name: of what was encoded, for messages.
        files: that it was read from.

    Raises:
        DiffSynthError: if a file has changed since it was hashed, or the encoding is not finite.
    """
    if any(hashes.known(path) is None for path in files):
        raise DiffSynthError(f"{name} changed while it was encoded", "rerun the command")
    if not all(bool(tensor.isfinite().all()) for tensor in encoded.values()):
        raise DiffSynthError(
            f"the output of the {component} for {name} contains NaN or Inf",
            "check the file, or encode with `--mixed_precision no`",
        )


def load_tokenizers(model: ModelPlan, family: Family, component: str) -> dict[str, Any]:
    """Load the tokenizers of a component, by parameter."""
    return {
        parameter: family.load_tokenizer(parameter, model.tokenizers[parameter])
        for parameter, tokenizer in model.facts.tokenizers.items()
        if tokenizer.component == component and parameter in model.tokenizers
    }
