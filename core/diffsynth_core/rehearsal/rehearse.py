"""Rehearsal: run a recipe with tiny random weights before renting a GPU.

Each component is replaced with a tiny one of the same architecture, written to disk in the real file layout and read
with the same code: sources, loaders, key maps. Nothing else in the run differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import read_record
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import make_numbered_folder
from diffsynth_core.planning.data.encodings import plan_encodings
from diffsynth_core.planning.output.folder import REPEAT_REHEARSAL
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import Reporter, pluralize
from diffsynth_core.rehearsal.preparation import prepare
from diffsynth_core.rehearsal.proofs import prove_checkpoint
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import RunResult, train


@dataclass(frozen=True)
class Rehearsal:
    """The run, what it proved, and the kind of synthetic media it trained on, if any: images, videos."""

    result: RunResult
    proofs: tuple[str, ...]
    synthetic_media: str | None

    @property
    def checkpoint(self) -> Path:
        """Path of the last checkpoint."""
        return self.result.folder / self.result.record.checkpoints[-1].file


def rehearse(
    resolved: Resolved,
    reporter: Reporter,
    stop: StopRequest,
    announce: Callable[[RunPlan], None],
) -> Rehearsal:
    """Run with tiny weights: half of the steps, a stop, a resume, the other half; then verify the saved files.

    Args:
        announce: called with the plan before it is executed.

    Raises:
        FaultsFound: as in planning.
        DiffSynthError: if a check fails.
    """
    prepared, base = prepare(resolved, reporter)
    plan = _settle_output(make_plan(prepared, reporter, base=base), resolved)
    announce(plan)
    half = plan.data.steps.total_steps // 2
    proofs = [
        f"loaded {pluralize(len(plan.model.components), 'component')} with tiny weights from the real file layout: {', '.join(plan.model.components)}"
    ]
    if half:
        train(plan, reporter, stop, stop_after=half)
    resuming = plan.parameters.model_copy(update={"resume": "auto"})
    resumed = make_plan(replace(prepared, parameters=resuming), reporter, base=base)
    if half:
        if resumed.output.start.first_step != half:
            raise DiffSynthError(
                f"the rehearsal stopped after step {half}, but would resume after step {resumed.output.start.first_step}"
            )
        if plan_encodings(resumed, reporter).components_to_load:
            raise DiffSynthError("the resumed run would encode samples that are already cached")
        proofs.append(f"stopped after step {half}, resumed, and finished at step {resumed.data.steps.total_steps}")
        proofs.append("the resumed run read all encodings from the cache and loaded no encoder")
    result = train(resumed, reporter, stop)
    proofs += prove_checkpoint(resumed, result)
    synthetic_media = None if resolved.origin("dataset_base_path").is_given else f"{plan.model.variant.target.kind}s"
    return Rehearsal(result, tuple(proofs), synthetic_media)


def how_to_repeat(resolved: Resolved) -> str:
    """Return the hint after an interrupted rehearsal: a folder set with `--output_path` may contain its first steps."""
    folder = resolved.parameters.output_path
    if resolved.origin("output_path").kind == "flag" and read_record(folder):
        return REPEAT_REHEARSAL.format(folder=folder)
    return "rerun the command"


def _settle_output(plan: RunPlan, resolved: Resolved) -> RunPlan:
    """Return the plan with a new output folder, unless one is set on the command line."""
    if resolved.origin("output_path").kind == "flag":
        return plan
    name = resolved.parameters.recipe or plan.model.facts.name
    name += f"-{resolved.stage}" if resolved.stage else ""
    folder = make_numbered_folder(Path("rehearsals"), lambda number: f"{name}-{number}")
    return replace(plan, parameters=plan.parameters.model_copy(update={"output_path": folder}))
