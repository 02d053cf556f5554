"""Shared fixtures of unit tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Write a `--config` file and return its path as a flag value."""

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return write
