"""When a run ends and what it costs, told once its speed is known."""

from datetime import datetime, timedelta

from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.probing import PROFILE_WARM_UP
from diffsynth_core.progress import Reporter, format_duration
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers.observer import Observer, StepReport
from diffsynth_core.training.pace import Pace, cost_in_words, seconds_left

MEASURED_STEPS = 3
"""Steps whose mean duration is taken for that of all."""


class ForecastObserver(Observer):
    """Says once when the run ends, and what it costs if the price of an hour is known."""

    def __init__(
        self, plan: RunPlan, pace: Pace, stop: StopRequest, reporter: Reporter, seconds_before: float = 0
    ) -> None:
        """`seconds_before`: of earlier commands, which a resumed run has cost as well."""
        self._plan, self._pace, self._stop, self._reporter = plan, pace, stop, reporter
        self._seconds_before = seconds_before
        # The first step of a process warms up, and a traced one is slower.
        self._first = 1 + (PROFILE_WARM_UP + plan.parameters.profile if plan.parameters.profile else 0)
        self._seconds: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self._seconds.append(report.seconds)
        if len(self._seconds) == self._first + MEASURED_STEPS and report.step < self._plan.data.steps.total_steps:
            self._reporter.info(self._forecast(report.step, sum(self._seconds[self._first :]) / MEASURED_STEPS))

    def _forecast(self, done: int, step_seconds: float) -> str:
        """When the run ends, at so many seconds a step and with the saves that are still due."""
        left = seconds_left(self._plan, self._pace, done, step_seconds)
        end = datetime.now().astimezone() + timedelta(seconds=left)
        costs = cost_in_words(self._plan, self._seconds_before + self._pace.elapsed + left)
        costs = f"; the whole run costs about {costs}" if costs else ""
        forecast = f"The run ends about {end:%Y-%m-%d %H:%M}, in {format_duration(left)}, at {step_seconds:.3g} s a step{costs}"
        if left <= self._stop.seconds_left:
            return forecast
        return (
            f"{forecast}; `--max_time` stops it in {format_duration(max(0.0, self._stop.seconds_left))} at the latest"
        )
