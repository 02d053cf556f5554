"""Batches of samples for frozen encoders."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffsynth_core.models.family import Encoded
from diffsynth_core.models.size_facts import encoded_at_once

Ref = TypeVar("Ref")
Inputs = Mapping[str, Any]
"""The columns that an encoder reads of one sample."""
Shapes = tuple[tuple[int, ...], ...]


def rounds_alike(module: nn.Module) -> bool:
    """Return whether samples of a batch are encoded as they are alone, within 1e-6: in float32 on a CPU.

    bfloat16 rounds coarsely, and so does TF32, in which GPUs compute convolutions of float32.
    """
    return all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in module.parameters())


class EncodingBatches(Generic[Ref]):
    """Encodes samples as they come, small ones of one shape together.

    What the cache holds must not depend on which samples were missing when it was filled: a run whose cache was filled
    in two goes would train on other bits. But kernels are chosen by the shapes of their inputs, so a sample alone is
    rounded otherwise than in a batch, and in a batch of two otherwise than in one of sixteen. So all batches of a shape
    have the same size; the last one is filled up with copies. Within a batch, a sample is computed independently of the
    others and of its position.
    """

    def __init__(self, encode: Callable[[Sequence[Inputs]], list[Encoded]], batched: bool) -> None:
        """Create it.

        Args:
            encode: inputs of samples of one shape -> their encodings.
            batched: whether samples are encoded together at all.
        """
        self._encode, self._batched = encode, batched
        self._waiting: dict[Shapes, list[tuple[Ref, Inputs]]] = {}

    def add(self, ref: Ref, sample: Inputs) -> list[tuple[Ref, Encoded]]:
        """Encode a sample, or let it wait for others; return what is encoded by now."""
        shapes = _shapes_of(sample)
        size = encoded_at_once(shapes) if self._batched else 1
        waiting = self._waiting.setdefault(shapes, [])
        waiting.append((ref, sample))
        return self._flush(waiting, size) if len(waiting) == size else []

    def rest(self) -> Iterator[tuple[Ref, Encoded]]:
        """Encode the samples that still wait."""
        for shapes, waiting in self._waiting.items():
            if waiting:
                yield from self._flush(waiting, encoded_at_once(shapes))

    def _flush(self, waiting: list[tuple[Ref, Inputs]], size: int) -> list[tuple[Ref, Encoded]]:
        """Encode samples of one shape in a batch of `size`."""
        refs, samples = [ref for ref, _ in waiting], [sample for _, sample in waiting]
        waiting.clear()
        encoded = self._encode([*samples, *[samples[-1]] * (size - len(samples))])
        return list(zip(refs, encoded, strict=False))


def _shapes_of(sample: Inputs) -> Shapes:
    """Return the shapes of the images and clips of a sample, `(C, F, H, W)` each."""
    return tuple(tuple(value.shape) for value in sample.values() if isinstance(value, Tensor))
