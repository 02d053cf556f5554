"""The output folder of a run: free, or with the same run to resume."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
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
from diffsynth_core.errors import DiffSynthError, Problem, list_names, report
from diffsynth_core.files import default_cache_path
from diffsynth_core.hub.identity import IDENTITIES, HashCache
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import Reporter, pluralize, verb

FINISHED = ("completed", "interrupted")
"""Statuses of a run whose record was finalized."""
REPEAT_REHEARSAL = "delete `{folder}`, or choose another `--output_path`"
"""Hint for the `folder` of a rehearsal, which cannot be resumed."""


@dataclass(frozen=True)
class RunComplete(Problem):
    """The run to resume has completed all its steps."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts.

    Attributes:
        first_step: completed steps.
        notes: remarks about resuming, for the plan.
        state: the state to restore.
        warnings: what the resumed run loses.
        fused_optimizer: whether the optimizer of the run to resume is fused; None for a new run.
    """

    first_step: int = 0
    notes: tuple[str, ...] = ()
    state: SavedState | None = None
    warnings: tuple[str, ...] = ()
    fused_optimizer: bool | None = None


def check_output(
    parameters: Parameters,
    fingerprint: str | None,
    steps: StepPlan | None,
    mixed_precision: str,
    model: ModelPlan | None,
    reporter: Reporter,
) -> ResumePoint:
    """Return where the run starts: at step 0 in a free folder, or where the run in the folder stopped.

    Reports what prevents it. Verifies the checksums of the state, once.

    Args:
        fingerprint: fingerprint of the dataset; None if it could not be read.
        steps: None if the dataset could not be read.
        model: None if it is not known.
    """
    folder = parameters.output_path
    write_problems = folder_faults(folder, "output_path")
    report(*write_problems)
    if any(problem.wrong_use for problem in write_problems):
        return ResumePoint()
    try:
        record = read_record(folder)
        if parameters.resume is None or record is None:
            _check_free(parameters, record)
            return ResumePoint()
        _check_same_run(parameters, record, fingerprint)
        _check_same_steps(parameters, folder, record, steps, mixed_precision)
        _check_same_storage(folder, record, model)
        return _resumed(parameters, record, steps, reporter)
    except DiffSynthError as error:
        report(*error.problems)
        return ResumePoint()


def folder_faults(folder: Path, parameter: str) -> list[Problem]:
    """Return why the folder in a parameter cannot be written."""
    if folder.exists() and not folder.is_dir():
        return [Problem(f"`{parameter}` `{folder}` is a file", "choose a folder", wrong_use=True)]
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            what = f"`{parameter}` `{folder}` cannot be created: `{path}` is a broken link"
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
    """Return why a cache cannot be used.

    A read-only cache is accepted, because it may contain everything needed; if not, writing to it fails later.
    """
    faults = folder_faults(cache, "cache_path")
    only_read = faults and not faults[0].wrong_use and (cache / "encodings").is_dir()
    return [] if only_read else faults


def _resumed(parameters: Parameters, record: RunRecord, steps: StepPlan | None, reporter: Reporter) -> ResumePoint:
    """Return where the run in the folder stopped."""
    folder, total = parameters.output_path, steps.total_steps if steps else None
    if total is not None and record.status in FINISHED and record.step >= total:
        report(_run_complete(folder, record.step, total))
        return ResumePoint()
    found = _intact_states(parameters, record, reporter)
    if found.newest is None and (found.damaged or record.step):
        report(_no_intact_state(folder, record, found.damaged))
        return ResumePoint()
    done = found.newest.loop_state.step if found.newest else 0
    # done == total: a run killed between its last state and its final record only has the record to finish.
    if total is not None and done > total:
        report(_run_complete(folder, done, total))
    notes = [
        f"resumed after step {done}" if done else "starts at step 0: the previous run was stopped before its first save"
    ]
    if record.diverged_step:
        notes.append(
            f"the loss of step {record.diverged_step} of the previous run was not finite, and will be again unless "
            "`learning_rate` or another optimizer parameter changes"
        )
    if steps and parameters.lr_scheduler != "constant" and record.total_steps != steps.total_steps:
        notes.append(
            f"the {parameters.lr_scheduler} schedule now ends at step {steps.total_steps}, "
            f"previously at {record.total_steps}: the learning rate jumps here"
        )
    lost = [
        f"the state after step {state.step} is damaged ({state.reason}): {pluralize(state.step - done, 'step')} "
        f"{verb(state.step - done, 'is', 'are')} lost"
        for state in found.damaged
    ]
    return ResumePoint(done, tuple(notes), found.newest, tuple(lost), record.fused_optimizer)


def _intact_states(parameters: Parameters, record: RunRecord, reporter: Reporter) -> FoundStates:
    identities = HashCache((parameters.cache_path or default_cache_path()) / IDENTITIES)

    def hashes(paths: Sequence[Path]) -> list[str]:
        identities.read_all(paths, reporter, "Verifying the state")
        return [identities.sha256(path) for path in paths]

    # Resuming right before a non-finite step would repeat it: its loss depends only on the weights and the step.
    before_divergence = record.diverged_step - 1 if record.diverged_step else None
    return find_states(parameters.output_path, record.id, hashes, before_divergence)


def _run_complete(folder: Path, done: int, total: int) -> RunComplete:
    return RunComplete(
        f"the run in `{folder}` has completed {pluralize(done, 'step')} and the parameters request {total}; "
        "request more with `--num_epochs` or `--max_steps`"
    )


def _no_intact_state(folder: Path, record: RunRecord, damaged: Sequence[DamagedState]) -> Problem:
    """Return the problem; the run is not restarted unasked, because its checkpoints may still be useful."""
    states = ", ".join(f"step {state.step} ({state.reason})" for state in damaged)
    what = f"it has no intact state: {states}" if damaged else f"its state after step {record.step} is missing"
    if record.diverged_step and not damaged and state_folders(folder):
        what = f"its only state is that after step {record.step}, from which the loss of step {record.diverged_step} was not finite"
    return Problem(
        f"the run in `{folder}` cannot be resumed: {what}", f"{_new_run(folder, record)}, or delete `{folder}`"
    )


def _new_run(folder: Path, record: RunRecord) -> str:
    """Return the hint to start a new run, from the weights of this one if it trained only a LoRA."""
    hint = "start a new run in another `--output_path`"
    trained = record.parameters
    if not record.checkpoints or trained.get("trainable_models") or not trained.get("lora_base_model"):
        return hint
    return f"{hint}, from its weights with `--lora_checkpoint {folder / record.checkpoints[-1].file}`"


def dataset_fingerprint(parameters: Parameters, samples: SampleSet) -> str:
    """Return a sha256 over captions, file names, file sizes and crops of all samples."""

    @cache
    def named(path: Path) -> tuple[str, int]:
        """Cached, because several rows may use one file, and network disks are slow."""
        return os.path.relpath(path, parameters.dataset_base_path), path.stat().st_size

    def described(crop: MediaCrop) -> list[object]:
        return [*named(crop.path), crop.transform]

    digest = hashlib.sha256()
    for sample in samples.samples:
        shown = {name: [described(crop) for crop in crops] for name, crops in sample.conditions.items()}
        captions = sample.captions if sample.other_captions else sample.caption
        rest = [
            *([dict(sample.values)] if sample.values else ()),
            *([asdict(sample.sampling)] if sample.sampling else ()),
        ]
        digest.update(json.dumps([sample.row, captions, described(sample.target), shown, *rest]).encode())
    return digest.hexdigest()


def _check_free(parameters: Parameters, record: RunRecord | None) -> None:
    folder = parameters.output_path
    if record:
        kind, hint = "run", "resume it with `--resume auto`, or choose another `--output_path`"
        if record.parameters.get("rehearse"):
            kind, hint = "rehearsal", REPEAT_REHEARSAL.format(folder=folder)
        elif parameters.rehearse:
            hint = "choose another `--output_path`"
        what = f"already holds a {kind} ({record.status}, {record.step} of {pluralize(record.total_steps, 'step')})"
        report(Problem(f"`output_path` `{folder}` {what}", hint, wrong_use=True))
        return
    checkpoints = checkpoint_files(folder) if folder.is_dir() else []
    if checkpoints:
        report(
            Problem(
                f"`output_path` `{folder}` already holds checkpoints of another program: {list_names(checkpoints)}",
                "choose another `--output_path`",
                wrong_use=True,
            )
        )


def _check_same_steps(
    parameters: Parameters, folder: Path, record: RunRecord, steps: StepPlan | None, mixed_precision: str
) -> None:
    """Check that the micro-batches per step and the precision are unchanged; the number of processes may differ."""
    at_once, flag = "processes", "processes"
    if parameters.context_parallel > 1 or record.parameters.get("context_parallel", 1) != 1:
        at_once, flag = "processes / context_parallel", "processes / `--context_parallel`"
    if steps and steps.micro_batches != record.micro_batches_per_step:
        report(
            Problem(
                f"a step had {record.micro_batches_per_step} micro-batches (accumulation x {at_once}) "
                f"in the run in `{folder}`, now {steps.micro_batches}",
                f"resume with `--gradient_accumulation_steps` x {flag} = {record.micro_batches_per_step}",
                wrong_use=True,
            )
        )
    if mixed_precision != record.mixed_precision:
        report(
            Problem(
                f"the precision was {record.mixed_precision} in the run in `{folder}`, now it is {mixed_precision}",
                f"resume with `--mixed_precision {record.mixed_precision}`",
                wrong_use=True,
            )
        )


def _check_same_storage(folder: Path, record: RunRecord, model: ModelPlan | None) -> None:
    """Check that the same components are stored in 8-bit floats or quantized: rounded weights compute other numbers."""
    float8_components = model.float8_components if model else []
    if float8_components != record.float8_components:
        before, now = (", ".join(names) or "nothing" for names in (record.float8_components, float8_components))
        report(
            Problem(
                f"`fp8_models` kept {before} in 8-bit floats in the run in `{folder}`, now {now}",
                "resume with the same value, or start a new run",
                wrong_use=True,
            )
        )
    quantized = model.quantized_components if model else {}
    if quantized != record.quantized_components:
        before, now = map(_quantizations, (record.quantized_components, quantized))
        report(
            Problem(
                f"`quant_options` quantized {before} in the run in `{folder}`, now {now}",
                "resume with the same value, or start a new run",
                wrong_use=True,
            )
        )


def _quantizations(storage: Mapping[str, str]) -> str:
    """Return which components are quantized, and to what, in words."""
    parts = []
    for component, kept in storage.items():
        method, _, left_out = kept.partition("/")
        names = left_out.replace(",", ", ")
        parts.append(f"{component} to {method}" + (f" but for {names}" if names else ""))
    return " and ".join(parts) or "nothing"


def _check_same_run(parameters: Parameters, record: RunRecord, fingerprint: str | None) -> None:
    now = as_plain(parameters)
    for name, value in now.items():
        before, setting = record.parameters.get(name, DEFAULTS[name]), SETTINGS[name]
        changes_course = setting.compared == "course"
        if changes_course and record.diverged_step:
            continue
        if setting.fixed_on_resume and value != before:
            shown = "blank" if before is None else f"`{format_value(before)}`"
            report(
                Problem(
                    f"`{name}` was {shown} in the run in `{parameters.output_path}`, now it is `{format_value(value)}`",
                    f"resume with the same value, or {_new_run(parameters.output_path, record) if changes_course else 'start a new run'}",
                    wrong_use=True,
                )
            )
    if fingerprint and fingerprint != record.dataset_fingerprint:
        report(
            Problem(
                f"the dataset has changed since the run in `{parameters.output_path}` was started",
                "resume with the same files and captions, or start a new run",
            )
        )
