"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from diffsynth_core.checkpoints.run_folder import (
    PAGE,
    VALIDATIONS,
    MemoryUse,
    RunRecord,
    claim_folder,
    folder_identity,
    read_previews,
    read_record,
    recorded_steps,
)
from diffsynth_core.checkpoints.saved_states import STATE_FOLDER, LoopState
from diffsynth_core.checkpoints.state import save_state
from diffsynth_core.errors import DiffSynthError, Interrupted, OutOfTime
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.drawing.preview_steps import preview_is_due
from diffsynth_core.planning.memory.disk import assumed_save_seconds
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.output.saves import checkpoint_is_due, state_is_due
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.validation import validation_is_due
from diffsynth_core.progress import Reporter, SilentReporter, format_bytes
from diffsynth_core.stop import StopRequest, out_of_time_before_first_step
from diffsynth_core.training.checkpointing import checkpoint_content, write_checkpoint
from diffsynth_core.training.engines import make_engine
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.loader import MicroBatch, iterate_micro_batches
from diffsynth_core.training.machines import of_first, with_start_of_first
from diffsynth_core.training.model import TrainingModule
from diffsynth_core.training.observers.every_run import observers_of_run
from diffsynth_core.training.observers.observer import Observer, StepReport, ValidationReport
from diffsynth_core.training.observers.progress import ProgressObserver, peak_memory
from diffsynth_core.training.pace import Pace, time_in_words
from diffsynth_core.training.previews import Previews, encode_previews
from diffsynth_core.training.run_record import open_record
from diffsynth_core.training.schedules import learning_rate
from diffsynth_core.training.setup import MakeEngine, fill_encodings, load_model, make_accelerator, make_optimizer
from diffsynth_core.training.trial import try_largest
from diffsynth_core.training.validation import Validation
from diffsynth_core.weights.writing import access_as_written

MAX_SKIPPED_STEPS = 20
"""Maximum number of consecutive skipped steps.

float16 scaling skips a step whose gradients overflow and halves its scale; after this many it will not recover.
"""


@dataclass(frozen=True)
class RunResult:
    """The folder and final record of a run."""

    folder: Path
    record: RunRecord


class Diverged(DiffSynthError):
    """A loss or gradient is not finite; continuing from the current weights would fail again."""


def train(
    plan: RunPlan,
    reporter: Reporter,
    stop: StopRequest,
    stop_after: int | None = None,
    *,
    open_engine: MakeEngine = make_engine,
    observers: Sequence[Observer] = (),
) -> RunResult:
    """Execute a plan: encode, train, save.

    Args:
        stop_after: behave as if interrupted after this step; for rehearsals.
        open_engine: creates what carries out the steps.
        observers: follow the run in this process, besides metrics and progress.

    Raises:
        DiffSynthError: on faults found while running, such as a non-finite loss.
        Interrupted: if a signal requested a stop; the state has been saved.
        OutOfTime: if the time that `stop` allows is over; the state has been saved.
    """
    pace = Pace(assumed_save_seconds(plan))
    accelerator = make_accelerator(plan)
    reporter = reporter if accelerator.is_main_process else SilentReporter()
    with claim_folder(plan.parameters.output_path) if accelerator.is_main_process else nullcontext():
        run = _open_run(plan, accelerator, reporter, stop, open_engine, observers, pace)
        return run.execute(stop, stop_after)


def _open_run(
    plan: RunPlan,
    accelerator: Accelerator,
    reporter: Reporter,
    stop: StopRequest,
    open_engine: MakeEngine,
    observers: Sequence[Observer],
    pace: Pace,
) -> "Run":
    """Fill the cache, load what a step needs, and continue from the plan's state."""
    if plan.parameters.resume is None and read_record(plan.parameters.output_path):
        raise DiffSynthError(
            f"another run has started in `{plan.parameters.output_path}`", "choose another `--output_path`"
        )
    plan = fill_encodings(with_start_of_first(plan, accelerator), accelerator, reporter, stop)
    encoded = encode_previews(plan, load_family(plan.model.facts.name), accelerator, reporter, stop)
    model, engine = load_model(plan, accelerator, reporter, stop, open_engine)
    previews = Previews(plan, encoded, model, engine, accelerator, reporter)
    return Run(plan, model, accelerator, reporter, engine, previews, observers, pace)


class Run:
    """One run in its folder: model, engine, progress and saved files."""

    def __init__(
        self,
        plan: RunPlan,
        model: TrainingModule,
        accelerator: Accelerator,
        reporter: Reporter,
        engine: Engine,
        previews: Previews,
        observers: Sequence[Observer],
        pace: Pace,
    ) -> None:
        self.plan, self.accelerator, self.reporter = plan, accelerator, reporter
        self.folder = plan.parameters.output_path
        self.model, self.engine = model, engine
        engine.prepare(model, partial(make_optimizer, plan))
        self.observers = list(observers)
        self.done = self.saved = plan.output.start.first_step
        """Step of the current weights, and of the latest state on disk."""
        self.samples_seen = 0
        self.skipped_in_a_row = 0
        self.validation = Validation(plan, engine, accelerator.process_index, accelerator.device)
        self.previews = previews
        self.validated: ValidationReport | None = None
        """The latest validation of this command."""
        self.pace = pace
        if plan.output.start.state:
            self.engine.restore(plan.output.start.state)
            self.samples_seen = plan.output.start.state.loop_state.samples_seen
        for warning in plan.output.start.warnings:
            reporter.warn(warning)
        # Before the record: a run that does not fit leaves nothing behind, and may be given again with flags.
        try_largest(plan, model, engine, accelerator.device, reporter)
        self.record = open_record(plan, self.samples_seen, accelerator, reporter)
        engine.wait()
        self.estimated_memory: int | None = None
        self._measure_memory()
        self.seconds_before = self.record.seconds
        self.folder_id = folder_identity(self.folder)

    def execute(self, stop: StopRequest, stop_after: int | None) -> RunResult:
        """Train from the plan's first step to the last; every exit leaves a record of how the run ended."""
        if self.accelerator.is_main_process:
            self.observers += observers_of_run(
                self.plan, self.record, self.pace, self.accelerator.device, self.reporter, stop
            )
            self.reporter.info(f"`{self.folder / PAGE}` shows how the run is going, in a browser")
        together = True
        try:
            self._loop(stop, stop_after)
            self._check_folder()
        except (Interrupted, OutOfTime):
            self._finish("interrupted")
            raise
        except KeyboardInterrupt:
            together, stop.at_once = False, True
            self._finish("interrupted")
            raise
        except BaseException as error:
            together = False
            if not isinstance(error, Diverged):
                self._rescue()
            with suppress(DiffSynthError):  # a full disk must not hide what came first
                self._finish("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            self._finish("interrupted" if self.record.step < self.plan.data.steps.total_steps else "completed")
        finally:
            for observer in self.observers:
                observer.on_end()
            if together:
                self.engine.wait()  # else the others end first, and this process soon after them
        return RunResult(self.folder, self.record)

    def _loop(self, stop: StopRequest, stop_after: int | None) -> None:
        """Fetch, forward, backward, check, step, report, save."""
        params, steps = self.plan.parameters, self.plan.data.steps
        first, total = self.plan.output.start.first_step, steps.total_steps
        micro_batches = iterate_micro_batches(self.plan, self.accelerator.process_index)
        self._check_time(stop)
        if of_first(first not in recorded_steps(self.folder / VALIDATIONS), self.accelerator):
            self._validate()
        if first and checkpoint_is_due(self.plan, first) and not self.record.has_checkpoint_of(first):
            self._save_checkpoint(interrupted=False)  # a fault occurred between the step and its checkpoint
        if bool(self.plan.previews) and of_first(first not in read_previews(self.folder), self.accelerator):
            self._draw_previews(stop)
        with self.reporter.task("Training", total, "steps", done=first) as task:
            observers = (*self.observers, ProgressObserver(task, self.accelerator.device))
            for step in range(first, total):
                started = time.perf_counter()
                self.pace.begin_step()
                part = steps.slice(step)
                sample_count = steps.samples_in(part)
                fetched = self._fetch(micro_batches, -(-(part.stop - part.start) // self.plan.machine.data_parallel))
                data_seconds = time.perf_counter() - started

                rate = learning_rate(step, params.learning_rate, params.lr_scheduler, params.lr_warmup_steps, total)
                self.engine.begin(rate, step)
                loss, gradient_norm, asked_to_stop, out_of_time = self._forward_backward(fetched, sample_count, stop)
                self._check_finite(step, loss, gradient_norm)
                self._update(sample_count)
                done = self.done
                seconds = time.perf_counter() - started
                self._check_folder()
                report = StepReport(
                    done, part.epoch, self.samples_seen, loss, rate, gradient_norm, seconds, data_seconds
                )
                for observer in observers:
                    observer.on_step(report)
                self.pace.end_step()

                self._validate()
                stopping = asked_to_stop or out_of_time or done == stop_after
                if stopping or checkpoint_is_due(self.plan, done):
                    self._save_checkpoint(interrupted=stopping and done < total)
                if stopping or state_is_due(self.plan, done):
                    self._save_state()
                if stopping and done < total:
                    if asked_to_stop:
                        raise Interrupted(
                            stop.signal_number or signal.SIGTERM,
                            f"interrupted after step {done} of {total}; the run is saved in `{self.folder}`",
                            "continue with `--resume auto`",
                        )
                    if out_of_time:
                        raise self._out_of_time()
                    return
                # After the saves, so that a run that ends here draws them when it is resumed. One that is asked to stop
                # in its last step is complete without those of that step.
                if not asked_to_stop:
                    self._draw_previews(stop)

    def _validate(self) -> None:
        """Measure the loss on the held-out samples, if that is due after the steps done."""
        if not validation_is_due(self.plan, self.done):
            return
        with self.pace.validating():
            report = self.validation.measure(self.done)
        self.validated = report
        self.reporter.info(f"Validation loss {report.loss:.4f} after step {self.done}")
        for observer in self.observers:
            observer.on_validation(report)

    def _draw_previews(self, stop: StopRequest) -> None:
        """Draw the previews, if that is due after the steps done, and as long as the run can end in time afterwards.

        Another step follows a drawing, because whether to stop is decided during a step.
        """
        if not preview_is_due(self.plan, self.done):
            return
        another_step = self.done < self.plan.data.steps.total_steps
        to_end = self.pace.seconds_to_end(another_step, validates=validation_is_due(self.plan, self.done + 1))
        if self._lacks_time(stop, to_end + self.pace.drawing_seconds):
            return

        def must_end() -> bool:  # the first drawing may take longer than the time allows: its seconds are not known
            return bool(stop) or (self.accelerator.is_main_process and stop.seconds_left < to_end)

        with self.pace.drawing():
            folder = self.previews.draw(self.done, must_end)
        if folder:
            for observer in self.observers:
                observer.on_preview(folder, self.done)

    def _check_time(self, stop: StopRequest) -> None:
        """Stop before the first step if encoding and loading left too little time even for a save after it."""
        if self.done < self.plan.data.steps.total_steps and self._lacks_time(stop, self.pace.save_seconds):
            raise self._out_of_time()

    def _lacks_time(self, stop: StopRequest, seconds: float) -> bool:
        """Return whether fewer seconds are left; the main process decides for all."""
        if not stop.limits_time:
            return False
        late = self.accelerator.is_main_process and stop.seconds_left < seconds
        return bool(self.engine.sum_over_processes(torch.tensor(float(late), device=self.accelerator.device)) > 0)

    def _out_of_time(self) -> OutOfTime:
        if not self.done:
            return out_of_time_before_first_step()
        total = self.plan.data.steps.total_steps
        return OutOfTime(
            f"stopped after step {self.done} of {total} because of `--max_time`; the run is saved in `{self.folder}`",
            "continue with `--resume auto`",
        )

    def _fetch(self, micro_batches: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
        return [next(micro_batches) for _ in range(count)]

    def _forward_backward(
        self, fetched: list[MicroBatch], sample_count: int, stop: StopRequest
    ) -> tuple[float, float, bool, bool]:
        """Compute the gradients of the mean loss over all samples of the step.

        Each micro-batch is scaled by world size / samples of the step, because engines average gradients over
        processes; so the result is the mean over samples, whatever the sizes of the micro-batches. Processes that
        compute a sample together have parts of its gradients each, which sum up like those of different samples.

        Returns:
            The mean loss, the norm of the gradients, whether any process was asked to stop, and whether the time allows
            no other step: all processes must stop after the same step, so both are reduced together with the loss.
        """
        total = torch.zeros(3, device=self.accelerator.device)
        for index, micro_batch in enumerate(fetched):
            weight = self.plan.machine.world_size / sample_count if micro_batch.counts else 0.0
            losses = self.engine.forward_backward(micro_batch, weight, last=index == len(fetched) - 1)
            if micro_batch.counts and self.plan.machine.counts(self.accelerator.process_index):
                total[0] += losses.sum()
        total[1] = float(bool(stop))
        total[2] = float(self._is_last_in_time(stop))
        total = self.engine.sum_over_processes(total)
        # Before the update, which must not use a value that is not finite: the only wait for the device in a step.
        loss_sum, asked, late, gradient_norm = torch.cat([total, self.engine.gradient_norm()[None]]).tolist()
        return loss_sum / sample_count, gradient_norm, asked > 0, late > 0

    def _is_last_in_time(self, stop: StopRequest) -> bool:
        """Return whether the run must stop after the current step to be saved in time; the main process decides."""
        if not (stop.limits_time and self.accelerator.is_main_process):
            return False
        saves_after_it = checkpoint_is_due(self.plan, self.done + 1) or state_is_due(self.plan, self.done + 1)
        validations = sum(validation_is_due(self.plan, self.done + ahead) for ahead in (1, 2))
        drawings = int(preview_is_due(self.plan, self.done + 1))
        return not self.pace.allows_another(stop.seconds_left, 1 + saves_after_it, validations, drawings)

    def _check_finite(self, step: int, loss: float, gradient_norm: float) -> None:
        """Stop before the optimizer uses a non-finite value; float16 scaling skips non-finite gradients itself.

        The current weights are not saved: this step would fail with them again at any learning rate, whereas training
        from the last state may take another course.
        """
        bad_gradient = not math.isfinite(gradient_norm) and not self.engine.skips_overflow
        if math.isfinite(loss) and not bad_gradient:
            return
        samples = self.plan.data.samples.samples
        # The samples of all processes, because the loss is the mean over all: each process raises the same error.
        part = self.plan.data.steps.slice(step)
        batches = (self.plan.data.steps.batches.batch(part.epoch, number) for number in range(part.start, part.stop))
        names = ", ".join(samples[ref.sample].name for batch in batches for ref in batch)
        what = "loss is" if not math.isfinite(loss) else "gradient is"
        self.record.diverged_step = step + 1
        clipped = "" if self.plan.parameters.fused_backward else " or `--max_grad_norm 1`"  # they exclude each other
        kept = f"the state after step {self.saved} is saved in `{self.folder / STATE_FOLDER}`"
        raise Diverged(
            f"the {what} not finite in step {step + 1}; {kept if self.saved else 'no earlier state was saved'}; "
            f"samples of this step: {names}",
            f"check these samples, or resume with `--resume auto` and a lower `--learning_rate`{clipped}",
        )

    def _update(self, sample_count: int) -> None:
        """Update the weights, and count the step."""
        updated = self.engine.step()
        self.done += 1
        self.samples_seen += sample_count
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_STEPS:  # float16 scaling found no scale with finite gradients
            raise Diverged(
                f"gradients overflowed float16 in {MAX_SKIPPED_STEPS} consecutive steps, the last is step {self.done}",
                "start a new run with `--mixed_precision bf16` or `no`",
            )

    def _save_checkpoint(self, interrupted: bool) -> None:
        """Save the trained weights; the checkpoint of an interrupted run is named after the step."""
        self.engine.wait()
        if self.accelerator.is_main_process or self.engine.gathers:
            self._write_checkpoint(interrupted)
        if self.plan.machine.context_parallel > 1:
            # The others would wait in the groups that exchange tokens, which give up sooner than the group of all.
            self.engine.wait()

    def _write_checkpoint(self, interrupted: bool) -> None:
        content = checkpoint_content(self.plan, self.model, self.engine.whole)
        averages = self.plan.training.optimizer.ema_decay is not None
        average = checkpoint_content(self.plan, self.model, self.engine.average) if averages else None
        if not self.accelerator.is_main_process:
            for each in filter(None, (content, average)):
                access_as_written(each.tensors, each.dtypes)
        else:
            epoch = self.plan.data.steps.slice(self.done - 1).epoch
            name = f"step-{self.done}" if self.plan.parameters.save_steps or interrupted else f"epoch-{epoch}"
            with self.pace.writing_checkpoint():
                entry = write_checkpoint(self.plan, content, self.folder, name, self.done, epoch, average)
            measured = self.validated
            if measured and measured.step == self.done and math.isfinite(measured.loss):
                entry = replace(entry, validation_loss=measured.loss)
            self.record.add_checkpoint(entry)
            settings = self.plan.parameters
            keep = settings.keep_checkpoints
            old = self.record.forget_old_checkpoints(keep, settings.keep_best) if keep else []
            self.record.save(self.folder)
            for saved in entry.files:
                self.reporter.info(f"Saved `{self.folder / saved.file}` ({format_bytes(saved.bytes)})")
            for replaced in (saved for entry in old for saved in entry.files):
                self._delete_checkpoint(self.folder / replaced.file)
            for observer in self.observers:
                for saved in entry.files:
                    observer.on_save(self.folder / saved.file, self.done)

    def _delete_checkpoint(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self.reporter.warn(f"cannot delete the old checkpoint `{path}`: {error.strerror}")
        else:
            self.reporter.info(f"Deleted `{path}`")

    def _save_state(self, together: bool = True) -> None:
        """Save the state for `--resume auto`; `together`: all processes have reached this point and wait for the
        end.
        """
        with self.pace.writing_state():
            tensors = self.engine.state()
            if self.accelerator.is_main_process:
                loop_state = LoopState(self.done, self.samples_seen, self.engine.scaler_state(), run=self.record.id)
                save_state(self.folder, loop_state, tensors, self.plan.parameters.keep_states)
            elif self.engine.gathers:
                access_as_written(tensors.weights)
                access_as_written(tensors.moments)
        # Only after the state is on disk: a kill in between must not leave a record of a step that is not saved.
        self.record.step, self.record.samples_seen, self.saved = self.done, self.samples_seen, self.done
        self.record.seconds = self.seconds_before + self.pace.elapsed
        self._measure_memory()
        if self.accelerator.is_main_process:
            self.record.save(self.folder)
            for observer in self.observers:
                observer.on_state(self.folder / STATE_FOLDER / f"step-{self.done}", self.done)
        if together:
            self.engine.wait()

    def _rescue(self) -> None:
        """Save the state of the last complete step before an error ends the run. Other processes may have ended."""
        if self.engine.updating or self.done == self.saved or not self.accelerator.is_main_process:
            return
        if self.engine.gathers and self.accelerator.num_processes > 1:
            self.reporter.warn(f"the state after step {self.done} is lost: it takes all processes to save it")
            return
        try:
            self._save_state(together=False)
        except Exception as error:  # whatever it is, the first error is the one to report
            self.reporter.warn(f"cannot save the state after step {self.done}: {error}")
        else:
            self.reporter.info(f"Saved the state after step {self.done}; continue with `--resume auto`")

    def _check_folder(self) -> None:
        """Stop if the folder was removed or renamed: open files would be written where nobody finds them."""
        if self.accelerator.is_main_process and folder_identity(self.folder) != self.folder_id:
            self.record.drop_missing_checkpoints(self.folder)
            self.saved = 0
            raise DiffSynthError(
                f"`{self.folder}` was removed or renamed during the run, which stopped after step {self.done}",
                "if it was renamed, the checkpoints and metrics so far are in the renamed folder; "
                "`--resume auto` continues from the state saved in a new folder of the old name",
            )

    def _measure_memory(self) -> None:
        """Record the peak of the GPU's memory so far against its estimate, which is made at the start of a command."""
        peak = peak_memory(self.accelerator.device)
        if peak is None or not self.accelerator.is_main_process:
            return
        if self.estimated_memory is None:
            config = memory_config(self.plan, find_workload(self.plan).largest)
            self.estimated_memory = device_memory(self.plan, config).peak
        self.record.memory = MemoryUse(self.estimated_memory, peak)

    def _finish(self, status: str, failure: str | None = None) -> None:
        self.record.status, self.record.failure = status, failure
        self.record.seconds = self.seconds_before + self.pace.elapsed
        self._measure_memory()
        if self.accelerator.is_main_process:
            self.record.save(self.folder)
        if failure is None:  # after a failure, the last message is what was saved
            self.reporter.info(f"The run has taken {time_in_words(self.plan, self.record.seconds)}")
