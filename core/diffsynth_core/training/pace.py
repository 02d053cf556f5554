"""How long the steps and saves of a run take, whether one more step ends in time, and what the time costs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from diffsynth_core.planning.drawing.preview_steps import count_drawings
from diffsynth_core.planning.memory.disk import SaveSeconds
from diffsynth_core.planning.output.saves import count_checkpoints, count_states, save_interval, state_interval
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.validation import count_validations
from diffsynth_core.progress import format_duration


class Pace:
    """What the process that saves measures: only it is never kept waiting by the saves of another.

    Attributes:
        slowest_step: seconds, with everything from one step to the next but saves, validations and previews; 0
            before the first.
        validation_seconds: of the slowest validation so far; 0 before the first.
        drawing_seconds: of the slowest drawing of previews so far; 0 before the first.
        update_seconds: of the slowest update of a mirror or hub so far, for one of which the end of the run waits.
    """

    def __init__(self, assumed: SaveSeconds) -> None:
        self.slowest_step = self.validation_seconds = self.drawing_seconds = self.update_seconds = 0.0
        self._assumed, self._checkpoint, self._state = assumed, 0.0, 0.0
        self._started = self._begun = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the command began to train or to encode for it."""
        return time.monotonic() - self._started

    @property
    def checkpoint_seconds(self) -> float:
        """A checkpoint takes as long as the slowest so far, or what was assumed before the first."""
        return self._checkpoint or self._assumed.checkpoint

    @property
    def state_seconds(self) -> float:
        """A state takes as long as the slowest so far, or what was assumed before the first."""
        return self._state or self._assumed.state

    @property
    def save_seconds(self) -> float:
        """How long a checkpoint and a state take."""
        return self.checkpoint_seconds + self.state_seconds

    def begin_step(self) -> None:
        """Begin to measure a step."""
        self._begun = time.monotonic()

    def end_step(self) -> None:
        """End a step, before what it may save."""
        self.slowest_step = max(self.slowest_step, time.monotonic() - self._begun)

    @contextmanager
    def writing_checkpoint(self) -> Iterator[None]:
        """Measure the checkpoint that is written in the block."""
        begun = time.monotonic()
        yield
        self._checkpoint = max(self._checkpoint, time.monotonic() - begun)

    @contextmanager
    def writing_state(self) -> Iterator[None]:
        """Measure the state that is written in the block."""
        begun = time.monotonic()
        yield
        self._state = max(self._state, time.monotonic() - begun)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Measure the validation in the block."""
        begun = time.monotonic()
        yield
        self.validation_seconds = max(self.validation_seconds, time.monotonic() - begun)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Measure the drawing of previews in the block."""
        begun = time.monotonic()
        yield
        self.drawing_seconds = max(self.drawing_seconds, time.monotonic() - begun)

    def seconds_to_end(self, another_step: bool, validates: bool) -> float:
        """How long the run takes to end between two steps, after another one that is saved and perhaps validates.

        One more of the slowest is to spare. After the last step, when all is saved, only an update is left.
        """
        step = 2 * self.slowest_step + self.save_seconds + validates * self.validation_seconds
        return another_step * step + self.update_seconds

    def allows_another(self, seconds_left: float, saves: int, validations: int = 0, drawings: int = 0) -> bool:
        """Return, during a step, whether the next one can end and be saved in time as well.

        What is left of this step and the next one are taken to be as slow as the slowest, this one so far included.

        Args:
            saves: how often something is saved until then, the last save included.
            validations: how often the run validates until then.
            drawings: how often it draws previews until then.
        """
        slowest = max(self.slowest_step, time.monotonic() - self._begun)
        besides = validations * self.validation_seconds + drawings * self.drawing_seconds
        return seconds_left >= 2 * slowest + saves * self.save_seconds + besides + self.update_seconds


def seconds_left(plan: RunPlan, pace: Pace, done: int, step_seconds: float) -> float:
    """Seconds from the end of step `done` to the end of the run."""
    total = plan.data.steps.total_steps
    checkpoints = count_checkpoints(plan) - done // save_interval(plan)
    states = count_states(plan) - done // state_interval(plan)
    validating = count_validations(plan, done, total) * pace.validation_seconds
    drawing = count_drawings(plan, done, total) * pace.drawing_seconds
    saving = checkpoints * pace.checkpoint_seconds + states * pace.state_seconds
    return (total - done) * step_seconds + saving + validating + drawing


def cost_in_words(plan: RunPlan, seconds: float) -> str:
    """What so much time costs, in the currency of `price_per_hour`; empty without it."""
    price = plan.parameters.price_per_hour
    return "" if price is None else f"{price * seconds / 3600:.2f}"


def time_in_words(plan: RunPlan, seconds: float) -> str:
    """How long something took, and what it cost if the price of an hour is known."""
    cost = cost_in_words(plan, seconds)
    return f"{format_duration(seconds)}{f' and cost {cost}' if cost else ''}"
