"""The plan of a command that writes weight files, as a value: printed in a dry run, executed otherwise."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffsynth_core.errors import FaultsFound, Problem
from diffsynth_core.weights.weight_writer import Output, OutputFile, output_bytes

DEFAULT_SHARD_SIZE = 5 * 10**9
"""Default maximum size of a shard, as in transformers."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Unit -> bytes."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")


@dataclass(frozen=True)
class FilePlan:
    """Files to write from inputs.

    Attributes:
        notes: remarks for the user, one line each.
        facts: the same for machine-readable output.
    """

    outputs: tuple[Output, ...]
    inputs: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[OutputFile, ...]:
        """The outputs with tensors."""
        return tuple(output for output in self.outputs if isinstance(output, OutputFile))

    @cached_property
    def sizes(self) -> dict[Path, int]:
        """Total bytes of each file."""
        return {output.path: output_bytes(output) for output in self.outputs}


def parse_size(text: str, option: str) -> int:
    """Return the bytes of a size such as `5GB`, `500 MB`, `2GiB` or `1000000`.

    Raises:
        FaultsFound: if `text` is not a size.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if size <= 0:
        raise FaultsFound([Problem(f"`{text}` is not a size (`{option}`)", "use a size such as `5GB`", wrong_use=True)])
    return size
