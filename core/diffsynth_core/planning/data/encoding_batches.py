"""Batches of samples for frozen encoders, for training and for generating."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffsynth_core.models.family import Encoded, Family
from diffsynth_core.models.size_facts import captions_at_once, encoded_at_once
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.planning.data.encoder_inputs import scale_pixels

Ref = TypeVar("Ref")
Inputs = Mapping[str, Any]
"""The columns that an encoder reads of one sample."""


@dataclass(frozen=True)
class BatchKind:
    """Which samples are encoded together.

    Attributes:
        shared: what they have in common: the shapes of their images and clips, or the group of their tokens.
        size: how many of them.
        filled: whether the last batch is filled up with copies.
    """

    shared: Hashable
    size: int
    filled: bool = False


ALONE = BatchKind(None, 1)
"""Samples are encoded one by one."""


def takes_batches(module: nn.Module) -> bool:
    """Return whether samples are encoded together: on devices whose speed they do not use one by one, and in float32.

    A CPU computes other dtypes no faster in batches, and would have to fill up those of captions too.
    """
    return _is_exact(module) or all(weight.device.type != "cpu" for weight in module.parameters())


def _is_exact(module: nn.Module) -> bool:
    """Return whether captions are encoded to the same bits in batches of any size: in float32 on a CPU."""
    return all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in module.parameters())


def image_batch(sample: Inputs) -> BatchKind:
    """Return which samples are encoded together with one that has images or clips, `(C, F, H, W)` each."""
    media = [one for value in sample.values() for one in (value if isinstance(value, list) else [value])]
    shapes = tuple(tuple(one.shape) for one in media if isinstance(one, Tensor))
    return BatchKind(shapes, encoded_at_once(shapes), filled=True)


class EncodingBatches(Generic[Ref]):
    """Encodes samples as they come, those of one kind together.

    What the cache holds must not depend on which samples were missing when it was filled: a run whose cache was filled
    in two goes would train on other bits. But kernels are chosen by the shapes of their inputs, so an image alone is
    rounded otherwise than in a batch, and in a batch of two otherwise than in one of sixteen. So all batches of a shape
    have the same size; the last one is filled up with copies. Within a batch, a sample is computed independently of the
    others and of its position. On a CPU in float32, captions are encoded to the same bits in a batch of any size, and
    theirs are not filled up.
    """

    def __init__(
        self, encode: Callable[[Sequence[Inputs]], list[Encoded]], kind_of: Callable[[Inputs], BatchKind]
    ) -> None:
        """Create it.

        Args:
            encode: inputs of samples of one kind -> their encodings.
            kind_of: inputs of a sample -> which are encoded with it.
        """
        self._encode, self.kind_of = encode, kind_of
        self._waiting: dict[BatchKind, list[tuple[Ref, Inputs]]] = {}

    @classmethod
    def of(cls, family: Family, encoder: EncoderFacts, components: Mapping[str, Any]) -> "EncodingBatches[Ref]":
        """Return the batches of an encoder, of samples as `Family.tokenize` makes them of what `load_input` returns."""
        module: nn.Module = components[encoder.component]
        device, filled = next(module.parameters()).device, not _is_exact(module)

        def encode(samples: Sequence[Inputs]) -> list[Encoded]:
            return family.encode_batch(encoder, components, [scale_pixels(sample, device) for sample in samples])

        def caption_batch(sample: Inputs) -> BatchKind:
            group = sample[family.facts.text_column].group
            return BatchKind(group, captions_at_once(group.length), filled)

        if not (family.encoders[encoder.name].batched and takes_batches(module)):
            return cls(encode, lambda sample: ALONE)
        return cls(encode, caption_batch if family.facts.text_column in encoder.columns else image_batch)

    def add(self, ref: Ref, sample: Inputs) -> list[tuple[Ref, Encoded]]:
        """Encode a sample, or let it wait for others; return what is encoded by now."""
        kind = self.kind_of(sample)
        waiting = self._waiting.setdefault(kind, [])
        waiting.append((ref, sample))
        return self._flush(waiting, kind) if len(waiting) == kind.size else []

    def rest(self) -> Iterator[tuple[Ref, Encoded]]:
        """Encode the samples that still wait."""
        for kind, waiting in self._waiting.items():
            if waiting:
                yield from self._flush(waiting, kind)

    def _flush(self, waiting: list[tuple[Ref, Inputs]], kind: BatchKind) -> list[tuple[Ref, Encoded]]:
        """Encode samples of one kind in a batch."""
        refs, samples = [ref for ref, _ in waiting], [sample for _, sample in waiting]
        waiting.clear()
        copies = kind.size - len(samples) if kind.filled else 0
        encoded = self._encode([*samples, *[samples[-1]] * copies])
        return list(zip(refs, encoded[: len(refs)], strict=True))
