"""Snapshots of the output of commands: one page per test module, one entry per case, reviewed as prose.

`pytest --snapshot-update tests/cli/test_x.py` rewrites the pages; the diff is reviewed like code.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.amber import AmberSnapshotExtension
from syrupy.extensions.amber.serializer import AmberDataSerializer

from diffsynth_core.errors import Problem
from tests.outcome import Outcome

Say = Callable[..., None]


class _PlainSerializer(AmberDataSerializer):
    """Text as printed, without quotes and escapes."""

    @classmethod
    def serialize(cls, data: object, **_: object) -> str:
        return str(data)


class PageExtension(AmberSnapshotExtension):
    """Pages in `__snapshots__/<module>.ambr` next to the tests."""

    serializer_class = _PlainSerializer


def _outcome(said: Outcome) -> str:
    return f"exit code {said.code}\n--- stdout\n{said.out}--- stderr\n{said.err}"


def _report(problems: Iterable[Problem]) -> str:
    return "\n".join(f"{one.message}\n  hint: {one.hint}" if one.hint else one.message for one in problems)


@pytest.fixture
def says(snapshot: SnapshotAssertion, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Say:
    """Compare the output of a command, problems, or any text, with the page of this test.

    Folders of the test session are shown as `<tmp>`, names of cached files as `<digest>`. `hide` are regular
    expressions for parts that differ between runs (seconds, disk sizes); each match is shown as `…`.
    """
    pages = snapshot.use_extension(PageExtension)
    session = str(tmp_path_factory.getbasetemp())

    def compare(said: Outcome | Iterable[Problem] | str, *hide: str) -> None:
        text = said if isinstance(said, str) else _outcome(said) if isinstance(said, Outcome) else _report(said)
        text = text.replace(str(tmp_path), "<tmp>").replace(session, "<session>")
        text = re.sub(r"(<session>/[a-z_]+)\d+", r"\1", text)  # pytest counts folders of one name
        text = re.sub(r"\b[0-9a-f]{2}/[0-9a-f]{64}\b", "<digest>", text)
        for pattern in hide:
            text = re.sub(pattern, "…", text)
        assert "\n".join(line.rstrip() for line in text.splitlines()) == pages

    return compare
