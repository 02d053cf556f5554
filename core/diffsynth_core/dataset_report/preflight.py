"""The quick part of the checks, which training runs before it plans a dataset: rows, and paths they name. No torch."""

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.metadata import locate_metadata
from diffsynth_core.dataset_report.caption_checks import check_captions
from diffsynth_core.dataset_report.path_checks import check_folders
from diffsynth_core.dataset_report.rules import rules_of
from diffsynth_core.dataset_report.thresholds import Thresholds
from diffsynth_core.dataset_report.validate import CheckOptions, examine
from diffsynth_core.errors import Problem
from diffsynth_core.models.spec import FamilyFacts, Variant
from diffsynth_core.planning.dataset import RowFault
from diffsynth_core.progress import SilentReporter

OF_PATHS = ("PATH_OUTSIDE", "PATH_CASE", "URL")
"""Codes of rows whose files are not to be opened."""
ADDED = (*OF_PATHS, "CAPTION_NAN", "FOLDER_UNREADABLE")
"""Codes of errors that planning does not know; the others it tells itself."""


def quick_check(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> list[RowFault]:
    """Errors of the dataset of a run that planning, which has read its rows, does not find."""
    base = parameters.dataset_base_path
    metadata = locate_metadata(base, parameters.dataset_metadata_path)
    rules = rules_of(parameters, facts, variant, Thresholds(), variant.title)
    dataset, findings = examine(base, metadata, rules, CheckOptions("named"), SilentReporter())
    findings += [*check_captions(dataset), *check_folders(dataset)]
    return [
        RowFault(
            Problem(f"`{dataset.table.origin}` {finding.message}", finding.hint, code=finding.code),
            finding.row if finding.code in OF_PATHS else None,
        )
        for finding in findings
        if finding.code in ADDED and finding.level == "error"
    ]
