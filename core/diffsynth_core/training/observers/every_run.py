"""The observers that a run has by itself, in its main process."""

import torch

from diffsynth_core.checkpoints.run_folder import RunRecord
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers.forecast import ForecastObserver
from diffsynth_core.training.observers.metrics import MetricsObserver
from diffsynth_core.training.observers.observer import Observer
from diffsynth_core.training.observers.page import PageObserver
from diffsynth_core.training.observers.profile import ProfileObserver
from diffsynth_core.training.observers.sharing import sharing_observers
from diffsynth_core.training.observers.trackers import tracker_observers
from diffsynth_core.training.pace import Pace


def observers_of_run(
    plan: RunPlan, record: RunRecord, pace: Pace, device: torch.device, reporter: Reporter, stop: StopRequest
) -> list[Observer]:
    """Return what follows every run, in the order in which it is told of a step."""
    folder, first = plan.parameters.output_path, plan.output.start.first_step
    found: list[Observer] = [
        MetricsObserver(folder, first, reporter.warn, validates=bool(plan.data.held_out)),
        *tracker_observers(plan, record, reporter),
        ForecastObserver(plan, pace, stop, reporter, record.seconds),
    ]
    if plan.parameters.profile:
        found.append(ProfileObserver(folder, plan.parameters.profile, device, reporter.info))
    # The page shows what those before have written, and what brings the run elsewhere takes the page along.
    found.append(PageObserver(folder, reporter.warn))
    return [*found, *sharing_observers(plan, record, reporter, pace, stop)]
