"""Codes PAIR_… and MASK_…: what belongs together in a row. Pure functions from facts to findings. No torch.

An empty cell of a reference column is PAIR_MISSING and found where cells are read (metadata_checks.py).
"""

from collections.abc import Iterator

from diffsynth_core.validation.examined import Examined
from diffsynth_core.validation.findings import Finding, found


def check_counts(examined: Examined) -> Iterator[Finding]:
    """PAIR_COUNT: more pictures to show than the model takes, or several files where one is trained on."""
    most = {rule.column: rule.most for rule in examined.rules.references} | {examined.columns.target: 1}
    for row, _, files in examined.records:
        for column, names in files.items():
            limit = most.get(column)
            if limit is not None and len(names) > limit:
                what = f"row {row}: column `{column}` names {len(names)} files, expected {limit}"
                yield found("PAIR_COUNT", what, "write one row per file", row=row)
