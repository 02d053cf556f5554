"""The first captions of a run's dataset as prompts, with their reference images. No torch."""

from collections.abc import Collection

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.metadata import read_metadata
from diffsynth_core.data.rows import read_rows
from diffsynth_core.errors import DiffSynthError, Problem, report
from diffsynth_core.models.dataset_columns import columns_of_run
from diffsynth_core.planning.drawing.prompts import PromptRow
from diffsynth_core.planning.model.model_plan import ModelPlan

MAX_CAPTIONS = 4
"""Maximum number of captions that are drawn."""


def prompts_of_dataset(
    parameters: Parameters, found: ModelPlan, given: Collection[str], way_out: str
) -> list[PromptRow]:
    """Return the first distinct captions of a run's dataset, with the images of their rows. Reports problems.

    Inputs that are frames of the clip are taken from the clip itself, as in training.

    Args:
        given: extra inputs whose images are given for all prompts, in place of those of the rows.
        way_out: hint for a dataset without captions.
    """
    folder, facts, variant = parameters.dataset_base_path, found.facts, found.variant
    try:
        metadata = read_metadata(
            folder, parameters.dataset_metadata_path, facts.text_column, variant.target.column, variant.target.kind
        )
    except DiffSynthError as error:
        report(Problem(f"no captions of the run: {error.problems[0].message}", way_out))
        return []
    rows = read_rows(metadata, columns_of_run(parameters, facts, variant), "named")
    columns = {condition.column: condition.column for condition in variant.conditions}
    columns |= {name: variant.target.column for name in facts.frame_inputs if name in parameters.extra_inputs}
    prompts: dict[str, PromptRow] = {}
    for record in rows.records:
        if record.row not in rows.faulty and record.caption and record.caption not in prompts:
            images = {
                name: tuple(metadata.base / path for path in record.files.get(column, ()))
                for name, column in columns.items()
                if name not in given
            }
            where = f"`{metadata.origin}` row {record.row}"
            prompts[record.caption] = PromptRow(where, record.caption, images=images)
    if not prompts:
        report(Problem(f"the dataset of the run, `{folder}`, has no captions", way_out))
    return list(prompts.values())[:MAX_CAPTIONS]
