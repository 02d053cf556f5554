"""The encoding cache: what the frozen encoders made of a sample, on disk, by content.

An entry is one safetensors file named by the sha256 of everything its content depends on. Entries are written whole or
not at all, never changed, and shared between runs and processes.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import replacing
from diffsynth_core.state_dicts.headers import read_header

if TYPE_CHECKING:
    import torch


def encoding_key(**parts: Any) -> str:
    """The name of an entry: sha256 of the parts its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class EncodingCache:
    """Entries below one folder, by family and encoder.

    `behind`: a cache whose entries count as those of this one; `fetch` brings them here.
    """

    def __init__(self, folder: Path, behind: "EncodingCache | None" = None) -> None:
        self._folder, self._behind = folder, behind

    def path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there and whole; one that a fault of the disk cut short is made anew."""
        return self._is_here(key) or (self._behind is not None and self._behind.has(key))

    def _is_here(self, key: str) -> bool:
        try:
            read_header(self.path(key))
        except DiffSynthError:
            return False
        return True

    def fetch(self, key: str) -> None:
        """Bring an entry here that only the cache behind has: as the same file where the disk can, else as a copy.

        Raises:
            DiffSynthError: when the entry is gone, or the disk refuses.
        """
        if self._behind is None or self._is_here(key):
            return
        source = self._behind.path(key)
        with replacing(self.path(key)) as temporary:
            try:
                temporary.hardlink_to(source)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, temporary)

    def write(self, key: str, encoded: Mapping[str, "torch.Tensor"]) -> None:
        """Keep what an encoder made of one sample."""
        from diffsynth_core.state_dicts.writing import write_safetensors

        with replacing(self.path(key)) as temporary:
            write_safetensors(temporary, encoded, {})

    def read(self, key: str) -> dict[str, "torch.Tensor"]:
        """An entry's tensors, on the CPU.

        Raises:
            DiffSynthError: when the entry is gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: dict[str, torch.Tensor] = load_file(self.path(key))
        except (OSError, SafetensorError) as error:
            raise DiffSynthError(
                f"cannot read the cached encoding `{self.path(key)}`: {error}",
                "delete that file and start again: it will be made anew",
            ) from error
        return tensors
