"""Weights on disk as weight stores pack them: quantized once, and read at the next start."""

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from diffsynth_core.data.cache import CacheWriter, EncodingCache, encoding_key
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import free_bytes
from diffsynth_core.progress import Reporter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VERSION = 1
"""Of formats (adapters/formats.py) and key maps; another one when a weight is packed to other bits than before."""


class PackedWeights:
    """The weights of one component: one entry of a cache each, named by all that it depends on.

    Entries are written in threads while the component is loaded; leaving the block waits for them. If the disk has no
    room for them, that is told, and no more are written: the next start packs those weights again.
    """

    def __init__(
        self, cache: EncodingCache, reporter: Reporter, *, writes: bool = True, reserved: int = 0, **content: Any
    ) -> None:
        """Open the entries of a component.

        Args:
            writes: whether entries are written; otherwise they are only read.
            reserved: bytes of the disk to leave free.
            content: what the weights depend on beside their name and the kind of device that packs them, as JSON.
        """
        self._cache, self._reporter, self._reserved = cache, reporter, reserved
        self._content = {"version": VERSION, **content}
        self._writer = CacheWriter(cache) if writes else None

    def find(self, name: str, device: "torch.device") -> "Mapping[str, Tensor] | None":
        """Return the tensors of a weight, in host memory, as this kind of device packed it; None: there is no intact
        entry.
        """
        return self._cache.find(self._key(name, device))

    def keep(self, name: str, device: "torch.device", packed: "Mapping[str, Tensor]") -> None:
        """Write the tensors of a weight that a device has packed."""
        size = sum(tensor.nbytes for tensor in packed.values())
        if self._writer and free_bytes(self._cache.folder) < self._reserved + size:
            self._give_up(f"the disk of `{self._cache.folder}` has no room for them beside what the run writes")
        if self._writer:
            try:
                self._writer.write(self._key(name, device), packed)
            except DiffSynthError as error:
                self._give_up(error.problems[0].message)

    def _key(self, name: str, device: "torch.device") -> str:
        return encoding_key(weight=name, device=device.type, **self._content)

    def _give_up(self, reason: str) -> None:
        assert self._writer
        self._writer.close(wait=False)
        self._writer = None
        self._reporter.warn(f"not all quantized weights are kept for the next start: {reason}")

    def __enter__(self) -> "PackedWeights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer:
            try:
                self._writer.close(wait=error is None)
            except DiffSynthError as failure:
                self._give_up(failure.problems[0].message)
