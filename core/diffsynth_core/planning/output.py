"""The folder of a run: free, or the same run to go on with."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from diffsynth_core.checkpoints.run_folder import RunRecord, holds_checkpoints, read_record
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import Parameters, as_plain
from diffsynth_core.data.batches import StepPlan
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import DiffSynthError, Problem, shorten

FREE_ON_RESUME = frozenset(
    {
        "recipe", "config", "rehearse", "dry_run", "resume", "device", "max_steps", "num_epochs", "save_steps",
        "dataset_base_path", "dataset_metadata_path", "dataset_num_workers", "cache_path", "output_path",
        "find_unused_parameters", "initialize_model_on_cpu", "offload_models", "use_gradient_checkpointing",
        "lora_format", "save_dtype", "model_paths", "model_id_with_origin_paths", "tokenizer_path", "lora_checkpoint",
    }
)  # fmt: skip
"""Parameters that a resumed run may change: they do not change what a step computes. Dataset and model files are
compared by content instead of by path."""


def check_output(
    parameters: Parameters, samples: SampleSet | None, steps: StepPlan | None, problems: list[Problem]
) -> int:
    """The step a run starts from; 0 unless it resumes. Adds to `problems`."""
    folder = parameters.output_path
    if folder.exists() and not folder.is_dir():
        problems.append(Problem(f"`output_path` `{folder}` is a file", "name a folder", wrong_use=True))
        return 0
    writable = next(parent for parent in (folder, *folder.parents, *folder.absolute().parents) if parent.exists())
    if not writable.is_dir():
        problems.append(
            Problem(
                f"`output_path` `{folder}` cannot be made: `{writable}` is a file",
                "name another folder",
                wrong_use=True,
            )
        )
        return 0
    if not os.access(writable, os.W_OK):
        problems.append(
            Problem(f"`output_path` `{folder}` cannot be written: `{writable}` is read-only", "name another folder")
        )
    try:
        record = read_record(folder)
    except DiffSynthError as error:
        problems += error.problems
        return 0
    if parameters.resume is None:
        _check_free(folder, record, problems)
        return 0
    if record is None:
        _check_free(folder, record, problems)
        return 0
    _check_same_run(parameters, record, samples, problems)
    from diffsynth_core.checkpoints.state import last_state, read_position

    state = last_state(folder)
    try:
        done = read_position(state).step if state else 0
    except DiffSynthError as error:
        problems += error.problems
        return 0
    if steps and done >= steps.total_steps:
        problems.append(
            Problem(
                f"the run in `{folder}` has done its {done} steps; the parameters ask for {steps.total_steps}",
                "nothing is left to do; ask for more with `--num_epochs` or `--max_steps`",
            )
        )
    return done


def dataset_fingerprint(parameters: Parameters, samples: SampleSet) -> str:
    """sha256 over captions, file names and sizes, and training sizes of all samples."""
    digest = hashlib.sha256()
    for sample in samples.samples:
        files = {
            column: [os.path.relpath(path, parameters.dataset_base_path), path.stat().st_size]
            for column, path in sample.media.items()
        }
        digest.update(json.dumps([sample.row, sample.caption, files, sample.height, sample.width]).encode())
    return digest.hexdigest()


def recorded_parameters(parameters: Parameters) -> dict[str, Any]:
    """The expanded parameters as `run.json` keeps them."""
    return as_plain(parameters)


def _check_free(folder: Path, record: RunRecord | None, problems: list[Problem]) -> None:
    if record:
        done = f"{record.status}, {record.step} of {record.total_steps} steps"
        problems.append(
            Problem(
                f"`output_path` `{folder}` already holds a run ({done})",
                "go on with it: `--resume auto`; or name another `--output_path`",
                wrong_use=True,
            )
        )
        return
    strangers = holds_checkpoints(folder) if folder.is_dir() else []
    if strangers:
        problems.append(
            Problem(
                f"`output_path` `{folder}` already holds checkpoints of another program: {shorten(strangers)}",
                "name another `--output_path`",
                wrong_use=True,
            )
        )


def _check_same_run(
    parameters: Parameters, record: RunRecord, samples: SampleSet | None, problems: list[Problem]
) -> None:
    now = as_plain(parameters)
    for name, value in now.items():
        before = record.parameters.get(name)
        if name not in FREE_ON_RESUME and value != before:
            shown = "blank" if before is None else f"`{format_value(before)}`"
            problems.append(
                Problem(
                    f"`{name}` was {shown} in the run in `{parameters.output_path}`, now it is `{format_value(value)}`",
                    "resume with the same value, or start a new run",
                    wrong_use=True,
                )
            )
    if samples and dataset_fingerprint(parameters, samples) != record.dataset_fingerprint:
        problems.append(
            Problem(
                f"the dataset is not the one that the run in `{parameters.output_path}` was started with",
                "resume with the same files and captions, or start a new run",
            )
        )
