"""The dataset of a run, checked as far as headers tell."""

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.metadata import read_metadata
from diffsynth_core.data.pictures import SizeRule
from diffsynth_core.data.samples import SampleSet, build_samples, check_columns
from diffsynth_core.errors import DiffSynthError, Problem
from diffsynth_core.families.interface import FamilyFacts
from diffsynth_core.progress import Reporter


def read_dataset(
    parameters: Parameters, facts: FamilyFacts, reporter: Reporter, problems: list[Problem]
) -> SampleSet | None:
    """The samples of the dataset; None when there is no telling them. Adds to `problems`."""
    for side in ("height", "width"):
        value = getattr(parameters, side)
        if value is not None and value % facts.size_factor:
            nearest = value // facts.size_factor * facts.size_factor
            problems.append(
                Problem(
                    f"`{side}` {value} is not a multiple of {facts.size_factor}, which {facts.title} needs",
                    f"give `--{side} {nearest}`",
                    wrong_use=True,
                )
            )
    for column in parameters.extra_inputs:
        problems.append(
            Problem(
                f"`extra_inputs` names `{column}`, which {facts.title} does not take", "leave it out", wrong_use=True
            )
        )
    base = parameters.dataset_base_path
    try:
        metadata = read_metadata(base, parameters.dataset_metadata_path, facts.text_column, facts.media_columns[0])
    except DiffSynthError as error:
        problems += error.problems
        return None
    faults = check_columns(metadata, facts.text_column, facts.media_columns, parameters.data_file_keys)
    problems += faults
    if faults:
        return None
    rule = SizeRule(parameters.height, parameters.width, parameters.max_pixels, facts.size_factor)
    samples, row_problems = build_samples(metadata, base, facts.text_column, facts.media_columns, rule, reporter)
    problems += row_problems
    return samples if samples.samples else None
