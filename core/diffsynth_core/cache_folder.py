"""Where the tool keeps what it can make again. Imports nothing heavy: a Tab key waits for it."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/diffsynth`, else `~/.cache/diffsynth`; None when the user has no home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "diffsynth"
    except RuntimeError:
        return None
