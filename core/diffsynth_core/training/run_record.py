"""Opening the record of a run: from then on its folder belongs to the run."""

from uuid import uuid4

from accelerate import Accelerator

from diffsynth_core.checkpoints.run_folder import (
    LOG,
    METRICS,
    RunRecord,
    forget_previews,
    package_versions,
    read_record,
    recorded_steps,
)
from diffsynth_core.config.parameters import as_plain
from diffsynth_core.planning.output.trackers import chosen_trackers
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter
from diffsynth_core.training.machines import of_first


def open_record(plan: RunPlan, samples_seen: int, accelerator: Accelerator, reporter: Reporter) -> RunRecord:
    """Open the record of the resumed run, or create one. All processes call this together; the main one writes it.

    Args:
        samples_seen: until the plan's first step.
    """
    folder, first = plan.parameters.output_path, plan.output.start.first_step
    record = of_first(read_record(folder), accelerator)
    if record is None:
        record = _new_record(plan)
    else:
        last = max(recorded_steps(folder / METRICS), default=0)
        record.tracked |= {name: max(last, record.tracked.get(name, 0)) for name in chosen_trackers(record.parameters)}
    # Checkpoints after the resumed state will be written again.
    record.checkpoints = [entry for entry in record.checkpoints if entry.step <= first]
    record.parameters = as_plain(plan.parameters)
    record.versions = package_versions(plan.training.optimizer.packages)
    record.tf32 = list(plan.machine.tf32) if accelerator.device.type == "cuda" else []
    record.status, record.failure, record.diverged_step = "running", None, None
    record.step, record.samples_seen, record.total_steps = first, samples_seen, plan.data.steps.total_steps
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        forget_previews(folder, after=first)
        reporter.log_to(folder / LOG)
        record.save(folder)
    return record


def _new_record(plan: RunPlan) -> RunRecord:
    return RunRecord(
        parameters=as_plain(plan.parameters),
        family=plan.model.facts.name,
        seed=plan.parameters.seed,
        dataset_fingerprint=plan.data.fingerprint,
        components={name: dict(files) for name, files in plan.encodings.identities.items()},
        mixed_precision=plan.machine.mixed_precision,
        micro_batches_per_step=plan.data.steps.micro_batches,
        id=uuid4().hex,
        float8_components=plan.model.float8_components,
        quantized_components=plan.model.quantized_components,
        fused_optimizer=plan.training.optimizer.fused,
    )
