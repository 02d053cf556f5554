"""Record of the inputs of a written file: their sha256, computed while they are read anyway. No torch."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import default_cache_path
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.json_files import InvalidJson, parse_json

MERGED = "diffsynth.merged"
"""Metadata key of a JSON list with an entry for each merge that led to the file, the last one last."""
UNKNOWN = "0" * 64
"""Placeholder of a sha256."""


class InputHashes:
    """sha256 of files, each hashed once and cached, in a thread next to the other work."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._found: dict[Path, str] = {}
        self._failed: OSError | None = None
        # A daemon: the process need not wait for it if something else fails.
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> Mapping[Path, str]:
        """Return all hashes.

        Raises:
            DiffSynthError: if a file cannot be read.
        """
        self._thread.join()
        if self._failed:
            raise DiffSynthError(f"cannot read `{self._failed.filename}`: {self._failed.strerror}") from self._failed
        return self._found

    def _run(self) -> None:
        identities = HashCache(default_cache_path() / "identities.jsonl")
        try:
            for path in self._paths:
                self._found[path] = identities.sha256(path)
        except OSError as error:
            self._failed = error


def merge_entry(
    base: Sequence[Path], loras: Sequence[tuple[Path, float]], hashes: Mapping[Path, str], **settings: Any
) -> dict[str, Any]:
    """Return the entry of one merge: version, files by name and sha256, weights of LoRAs. No time, no paths."""
    return {
        "diffsynth": version("diffsynth-cli"),
        **({"base": {path.name: hashes.get(path, UNKNOWN) for path in base}} if base else {}),
        "loras": [{"file": path.name, "sha256": hashes.get(path, UNKNOWN), "weight": weight} for path, weight in loras],
        **settings,
    }


def with_entry(metadata: Mapping[str, str], entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata with one more merge."""
    try:
        before = parse_json(metadata.get(MERGED, "[]"))
    except InvalidJson:
        before = []
    entries = [*before, entry] if isinstance(before, list) else [entry]
    return {**metadata, MERGED: json.dumps(entries, separators=(",", ":"))}
