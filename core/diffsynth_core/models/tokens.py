"""Captions as the tokens that text encoders read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenGroup(NamedTuple):
    """What captions that are encoded in one pass have in common.

    Attributes:
        length: their number of tokens, padding included.
        padded: whether some are padding: where none is, attention has no mask and thereby another kernel.
    """

    length: int
    padded: bool


@dataclass(frozen=True)
class Tokens:
    """A caption as a text encoder reads it.

    Attributes:
        ids: `[L]` int64, special tokens and padding included.
        mask: `[L]` int64, 0 where it is padded; None: no token is padding.
        truncated: whether the caption is longer.
    """

    ids: Tensor
    mask: Tensor | None
    truncated: bool

    @property
    def group(self) -> TokenGroup:
        """The captions that are encoded together with it."""
        return TokenGroup(len(self.ids), self.mask is not None and not bool(self.mask.all()))


def tokenize(tokenizer: Any, text: str, most: int, *, padded: bool = False) -> Tokens:
    """Tokenize a text with a tokenizer of transformers.

    Args:
        most: tokens that are kept, special ones included.
        padded: whether shorter texts are padded to as many.
    """
    found = tokenizer(
        [text], max_length=most, truncation=True, padding="max_length" if padded else False, return_tensors="pt"
    )
    mask = None if found.attention_mask is None else found.attention_mask[0]
    return Tokens(found.input_ids[0], mask, truncated=bool(found.encodings[0].overflowing))


def stack_tokens(captions: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the ids and masks of captions of one group, `[B, L]` int64 each."""
    masks = [caption.mask for caption in captions if caption.mask is not None]
    ids = torch.stack([caption.ids for caption in captions]).to(device)
    return ids, torch.stack(masks).to(device) if masks else None
