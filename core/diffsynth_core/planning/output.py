"""The folder of a run: free, or the same run to go on with."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import RunRecord, checkpoint_files, read_record
from diffsynth_core.checkpoints.saved_states import DamagedState, FoundStates, SavedState, find_states, state_folders
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import DEFAULTS, SETTINGS, Parameters, as_plain
from diffsynth_core.data.batches import StepPlan
from diffsynth_core.data.media import MediaCrop
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import DiffSynthError, Problem, list_names
from diffsynth_core.files import default_cache_path
from diffsynth_core.hub.identity import IDENTITIES, HashCache
from diffsynth_core.progress import Reporter, pluralize

FINISHED = ("completed", "interrupted")
"""Statuses of a run whose record was brought to its end."""
REPEAT_REHEARSAL = "delete `{folder}`, or choose another `--output_path`"
"""What to do with the `folder` of a rehearsal, with which nothing goes on."""


@dataclass(frozen=True)
class RunComplete(Problem):
    """The run to resume has done all its steps."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: the steps it has behind it, the state that holds them, and what is worth saying of going on.

    `warnings`: what a resumed run loses.
    """

    first_step: int = 0
    notes: tuple[str, ...] = ()
    state: SavedState | None = None
    warnings: tuple[str, ...] = ()


def check_output(
    parameters: Parameters,
    fingerprint: str | None,
    steps: StepPlan | None,
    mixed_precision: str,
    float8_components: Sequence[str],
    reporter: Reporter,
    problems: list[Problem],
) -> ResumePoint:
    """Where the run starts: at 0 in a free folder, or where the run in the folder stopped. Adds to `problems`.

    `fingerprint`: that of the dataset, when it could be read. Reads the state back whole, once, to be sure of it.
    """
    folder = parameters.output_path
    place_problems = folder_faults(folder, "output_path")
    problems += place_problems
    if any(problem.wrong_use for problem in place_problems):
        return ResumePoint()
    try:
        record = read_record(folder)
        if parameters.resume is None or record is None:
            _check_free(parameters, record, problems)
            return ResumePoint()
        _check_same_run(parameters, record, fingerprint, problems)
        _check_same_steps(folder, record, steps, mixed_precision, problems)
        _check_same_storage(folder, record, float8_components, problems)
        return _resumed(parameters, record, steps, reporter, problems)
    except DiffSynthError as error:
        problems += error.problems
        return ResumePoint()


def folder_faults(folder: Path, parameter: str) -> list[Problem]:
    """Why nothing can be written at the place that a parameter names."""
    if folder.exists() and not folder.is_dir():
        return [Problem(f"`{parameter}` `{folder}` is a file", "choose a folder", wrong_use=True)]
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            what = f"`{parameter}` `{folder}` cannot be created: `{place}` is a broken link"
            return [Problem(what, "choose another folder", wrong_use=True)]
    nearest = next(parent for parent in (folder, *folder.parents, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        what = f"`{parameter}` `{folder}` cannot be created: `{nearest}` is a file"
        return [Problem(what, "choose another folder", wrong_use=True)]
    if not os.access(nearest, os.W_OK):
        what = f"`{parameter}` `{folder}` is not writable: `{nearest}` is read-only"
        return [Problem(what, f"choose another folder with `--{parameter}`")]
    return []


def cache_faults(cache: Path) -> list[Problem]:
    """Why a cache cannot be used. One that can only be read may hold all that is needed: that shows later."""
    faults = folder_faults(cache, "cache_path")
    only_read = faults and not faults[0].wrong_use and (cache / "encodings").is_dir()
    return [] if only_read else faults


def _resumed(
    parameters: Parameters, record: RunRecord, steps: StepPlan | None, reporter: Reporter, problems: list[Problem]
) -> ResumePoint:
    """The position of the run in the folder."""
    folder, total = parameters.output_path, steps.total_steps if steps else None
    if total is not None and record.status in FINISHED and record.step >= total:
        problems.append(_run_complete(folder, record.step, total))
        return ResumePoint()
    found = _find_states(parameters, record, reporter)
    if found.newest is None and (found.damaged or record.step):
        problems.append(_no_intact_state(folder, record, found.damaged))
        return ResumePoint()
    done = found.newest.loop_state.step if found.newest else 0
    # A run killed between its last state and the end of its record has only its record to finish.
    if total is not None and done > total:
        problems.append(_run_complete(folder, done, total))
    notes = [
        f"resumed after step {done}" if done else "starts at step 0: the previous run was stopped before its first save"
    ]
    if record.diverged_step:
        notes.append(
            f"the loss of step {record.diverged_step} of the previous run was not finite: it will be so again unless "
            "`learning_rate` or another optimizer parameter changes"
        )
    if steps and parameters.lr_scheduler != "constant" and record.total_steps != steps.total_steps:
        notes.append(
            f"the {parameters.lr_scheduler} schedule now ends at step {steps.total_steps}, "
            f"before at {record.total_steps}: the learning rate jumps here"
        )
    lost = [
        f"the state after step {state.step} is damaged ({state.reason}): {pluralize(state.step - done, 'step')} "
        f"{'is' if state.step - done == 1 else 'are'} lost"
        for state in found.damaged
    ]
    return ResumePoint(done, tuple(notes), found.newest, tuple(lost))


def _find_states(parameters: Parameters, record: RunRecord, reporter: Reporter) -> FoundStates:
    identities = HashCache((parameters.cache_path or default_cache_path()) / IDENTITIES)

    def hashes(paths: Sequence[Path]) -> list[str]:
        identities.read_all(paths, reporter, "Verifying the state")
        return [identities.sha256(path) for path in paths]

    # With the weights before it a step that was not finite is so again: its loss depends on nothing else.
    below = record.diverged_step - 1 if record.diverged_step else None
    return find_states(parameters.output_path, record.id, hashes, below)


def _run_complete(folder: Path, done: int, total: int) -> RunComplete:
    return RunComplete(
        f"the run in `{folder}` has completed {pluralize(done, 'step')} and the parameters request {total}; "
        "request more with `--num_epochs` or `--max_steps`"
    )


def _no_intact_state(folder: Path, record: RunRecord, damaged: Sequence[DamagedState]) -> Problem:
    """The run cannot be resumed, and does not start over unasked: its checkpoints still have a value."""
    states = ", ".join(f"step {state.step} ({state.reason})" for state in damaged)
    what = f"it has no intact state: {states}" if damaged else f"its state after step {record.step} is missing"
    if record.diverged_step and not damaged and state_folders(folder):
        what = f"its only state is that after step {record.step}, from which the loss of step {record.diverged_step} was not finite"
    return Problem(
        f"the run in `{folder}` cannot be resumed: {what}", f"{_new_run(folder, record)}, or delete `{folder}`"
    )


def _new_run(folder: Path, record: RunRecord) -> str:
    """How to start a run that goes on from the weights of another one, where a LoRA is all that it trained."""
    hint = "start a new run in another `--output_path`"
    trained = record.parameters
    if not record.checkpoints or trained.get("trainable_models") or not trained.get("lora_base_model"):
        return hint
    return f"{hint}, from its weights with `--lora_checkpoint {folder / record.checkpoints[-1].file}`"


def dataset_fingerprint(parameters: Parameters, samples: SampleSet) -> str:
    """sha256 over captions, file names and sizes, and what of the files is trained on, of all samples."""

    @cache
    def named(path: Path) -> tuple[str, int]:
        """Asked once of a file that several rows show, or one at two sizes: disks far away take their time."""
        return os.path.relpath(path, parameters.dataset_base_path), path.stat().st_size

    def described(crop: MediaCrop) -> list[object]:
        return [*named(crop.path), crop.transform]

    digest = hashlib.sha256()
    for sample in samples.samples:
        shown = {name: [described(crop) for crop in crops] for name, crops in sample.references.items()}
        told = [sample.row, sample.caption, described(sample.target), shown]
        digest.update(json.dumps([*told, asdict(sample.sampling)] if sample.sampling else told).encode())
    return digest.hexdigest()


def _check_free(parameters: Parameters, record: RunRecord | None, problems: list[Problem]) -> None:
    folder = parameters.output_path
    if record:
        kind, hint = "run", "resume it with `--resume auto`, or choose another `--output_path`"
        if record.parameters.get("rehearse"):
            kind, hint = "rehearsal", REPEAT_REHEARSAL.format(folder=folder)
        elif parameters.rehearse:
            hint = "choose another `--output_path`"
        what = f"already holds a {kind} ({record.status}, {record.step} of {record.total_steps} steps)"
        problems.append(Problem(f"`output_path` `{folder}` {what}", hint, wrong_use=True))
        return
    checkpoints = checkpoint_files(folder) if folder.is_dir() else []
    if checkpoints:
        problems.append(
            Problem(
                f"`output_path` `{folder}` already holds checkpoints of another program: {list_names(checkpoints)}",
                "choose another `--output_path`",
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
                "resume with the same value, or start a new run",
                wrong_use=True,
            )
        )


def _check_same_run(
    parameters: Parameters, record: RunRecord, fingerprint: str | None, problems: list[Problem]
) -> None:
    now = as_plain(parameters)
    for name, value in now.items():
        before, setting = record.parameters.get(name, DEFAULTS[name]), SETTINGS[name]
        changes_course = setting.compared == "course"
        if changes_course and record.diverged_step:
            continue
        if setting.fixed_on_resume and value != before:
            shown = "blank" if before is None else f"`{format_value(before)}`"
            problems.append(
                Problem(
                    f"`{name}` was {shown} in the run in `{parameters.output_path}`, now it is `{format_value(value)}`",
                    f"resume with the same value, or {_new_run(parameters.output_path, record) if changes_course else 'start a new run'}",
                    wrong_use=True,
                )
            )
    if fingerprint and fingerprint != record.dataset_fingerprint:
        problems.append(
            Problem(
                f"the dataset has changed since the run in `{parameters.output_path}` was started",
                "resume with the same files and captions, or start a new run",
            )
        )
