"""The folder of a run: free, or the same run to go on with."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import RunRecord, holds_checkpoints, read_record
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import DEFAULTS, SETTINGS, Parameters, as_plain
from diffsynth_core.data.batches import StepPlan
from diffsynth_core.data.media import Excerpt
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import DiffSynthError, Problem, shorten

REPEAT_REHEARSAL = "delete `{folder}`, or name another `--output_path`"
"""What to do with the `folder` of a rehearsal, with which nothing goes on."""


@dataclass(frozen=True)
class NothingLeft(Problem):
    """The run to resume has done all its steps."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: the steps it has behind it, and what is worth saying of going on."""

    first_step: int = 0
    notes: tuple[str, ...] = ()


def check_output(
    parameters: Parameters,
    fingerprint: str | None,
    steps: StepPlan | None,
    mixed_precision: str,
    float8_components: Sequence[str],
    problems: list[Problem],
) -> Start:
    """Where the run starts: at 0 in a free folder, or where the run in the folder stopped. Adds to `problems`.

    `fingerprint`: that of the dataset, when it could be read.
    """
    folder = parameters.output_path
    place_problems = place_faults(folder, "output_path")
    problems += place_problems
    if any(problem.wrong_use for problem in place_problems):
        return Start()
    try:
        record = read_record(folder)
        if parameters.resume is None or record is None:
            _check_free(parameters, record, problems)
            return Start()
        _check_same_run(parameters, record, fingerprint, problems)
        _check_same_steps(folder, record, steps, mixed_precision, problems)
        _check_same_storage(folder, record, float8_components, problems)
        return _resumed(parameters, record, steps, problems)
    except DiffSynthError as error:
        problems += error.problems
        return Start()


def place_faults(folder: Path, parameter: str) -> list[Problem]:
    """Why nothing can be written at the place that a parameter names."""
    if folder.exists() and not folder.is_dir():
        return [Problem(f"`{parameter}` `{folder}` is a file", "name a folder", wrong_use=True)]
    nearest = next(parent for parent in (folder, *folder.parents, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        what = f"`{parameter}` `{folder}` cannot be made: `{nearest}` is a file"
        return [Problem(what, "name another folder", wrong_use=True)]
    if not os.access(nearest, os.W_OK):
        what = f"`{parameter}` `{folder}` cannot be written: `{nearest}` is read-only"
        return [Problem(what, f"name another folder with `--{parameter}`")]
    return []


def _resumed(parameters: Parameters, record: RunRecord, steps: StepPlan | None, problems: list[Problem]) -> Start:
    """The position of the run in the folder."""
    from diffsynth_core.checkpoints.state import last_state, read_position

    folder = parameters.output_path
    state = last_state(folder)
    done = read_position(state).step if state else 0
    # A run killed between its last state and the end of its record has only its record to finish.
    if steps and done >= steps.total_steps and record.status in ("completed", "interrupted"):
        problems.append(
            NothingLeft(
                f"the run in `{folder}` has done its {done} steps; the parameters ask for {steps.total_steps}",
                "nothing is left to do; ask for more with `--num_epochs` or `--max_steps`",
            )
        )
    notes = [f"resumed after step {done}"]
    if steps and parameters.lr_scheduler != "constant" and record.total_steps != steps.total_steps:
        notes.append(
            f"the {parameters.lr_scheduler} learning rate now ends at step {steps.total_steps}, "
            f"before at {record.total_steps}: it jumps here"
        )
    return Start(done, tuple(notes))


def dataset_fingerprint(parameters: Parameters, samples: SampleSet) -> str:
    """sha256 over captions, file names and sizes, and what of the files is trained on, of all samples."""

    @cache
    def named(path: Path) -> tuple[str, int]:
        """Asked once of a file that several rows show, or one at two sizes: disks far away take their time."""
        return os.path.relpath(path, parameters.dataset_base_path), path.stat().st_size

    def described(excerpt: Excerpt) -> list[object]:
        return [*named(excerpt.path), excerpt.transform]

    digest = hashlib.sha256()
    for sample in samples.samples:
        shown = {name: [described(excerpt) for excerpt in excerpts] for name, excerpts in sample.references.items()}
        told = [sample.row, sample.caption, described(sample.target), shown]
        digest.update(json.dumps([*told, asdict(sample.sampling)] if sample.sampling else told).encode())
    return digest.hexdigest()


def _check_free(parameters: Parameters, record: RunRecord | None, problems: list[Problem]) -> None:
    folder = parameters.output_path
    if record:
        kind, hint = "run", "go on with it: `--resume auto`; or name another `--output_path`"
        if record.parameters.get("rehearse"):
            kind, hint = "rehearsal", REPEAT_REHEARSAL.format(folder=folder)
        elif parameters.rehearse:
            hint = "name another `--output_path`"
        what = f"already holds a {kind} ({record.status}, {record.step} of {record.total_steps} steps)"
        problems.append(Problem(f"`output_path` `{folder}` {what}", hint, wrong_use=True))
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


def _check_same_steps(
    folder: Path, record: RunRecord, steps: StepPlan | None, mixed_precision: str, problems: list[Problem]
) -> None:
    """What a step is made of must stay, however it is shared out among processes."""
    if steps and steps.micro_batches != record.micro_batches_per_step:
        problems.append(
            Problem(
                f"a step had {record.micro_batches_per_step} micro-batches (accumulation x processes) "
                f"in the run in `{folder}`, now {steps.micro_batches}",
                f"resume with `--gradient_accumulation_steps` x processes = {record.micro_batches_per_step}",
                wrong_use=True,
            )
        )
    if mixed_precision != record.mixed_precision:
        problems.append(
            Problem(
                f"the precision was {record.mixed_precision} in the run in `{folder}`, now it is {mixed_precision}",
                f"resume with `--mixed_precision {record.mixed_precision}`",
                wrong_use=True,
            )
        )


def _check_same_storage(
    folder: Path, record: RunRecord, float8_components: Sequence[str], problems: list[Problem]
) -> None:
    """Rounded weights compute otherwise than those they were rounded from."""
    if list(float8_components) != record.float8_components:
        before, now = (", ".join(names) or "nothing" for names in (record.float8_components, float8_components))
        problems.append(
            Problem(
                f"`fp8_models` kept {before} in 8-bit floats in the run in `{folder}`, now {now}",
                "resume with the same, or start a new run",
                wrong_use=True,
            )
        )


def _check_same_run(
    parameters: Parameters, record: RunRecord, fingerprint: str | None, problems: list[Problem]
) -> None:
    now = as_plain(parameters)
    for name, value in now.items():
        before = record.parameters.get(name, DEFAULTS[name])
        if SETTINGS[name].fixed_on_resume and value != before:
            shown = "blank" if before is None else f"`{format_value(before)}`"
            problems.append(
                Problem(
                    f"`{name}` was {shown} in the run in `{parameters.output_path}`, now it is `{format_value(value)}`",
                    "resume with the same value, or start a new run",
                    wrong_use=True,
                )
            )
    if fingerprint and fingerprint != record.dataset_fingerprint:
        problems.append(
            Problem(
                f"the dataset is not the one that the run in `{parameters.output_path}` was started with",
                "resume with the same files and captions, or start a new run",
            )
        )
