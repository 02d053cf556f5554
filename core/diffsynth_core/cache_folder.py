"""The folder for data that can be recomputed. Imports nothing slow, because shell completion waits for it."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return `$XDG_CACHE_HOME/diffsynth`, or `~/.cache/diffsynth`; None if the user has no home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "diffsynth"
    except RuntimeError:
        return None
