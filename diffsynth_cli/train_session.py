"""One `train` command in the terminal: plan, rehearse or train stage by stage, and report how each ended."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth_cli import REPORTS, launching
from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.downloading import ensure_downloaded
from diffsynth_cli.errors import exit_code_of, lines_for_log
from diffsynth_cli.estimate_text import (
    Estimate,
    change_lines,
    estimate_lines,
    make_estimate,
    trial_lines,
    verdict_line,
)
from diffsynth_cli.plan_summary import ALL, summary_lines
from diffsynth_cli.plan_text import WARNING, parameter_lines, plan_lines, warning_lines
from diffsynth_cli.printing import echo, echo_line, echo_styled
from diffsynth_cli.ranks import in_company
from diffsynth_cli.streams import stdout_as_messages
from diffsynth_cli.wrapping import terminal_width, wrap_line
from diffsynth_core.checkpoints.run_folder import LOG, METRICS
from diffsynth_core.config.documents import command_line
from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import (
    EXIT_DOES_NOT_FIT,
    SIGNAL_EXIT_BASE,
    DiffSynthError,
    FaultsFound,
    Interrupted,
    Problem,
    raise_if_any,
)
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.client import downloads_disabled
from diffsynth_core.hub.model_files import MissingFiles, missing_in_one
from diffsynth_core.planning.dataset import MissingDataset
from diffsynth_core.progress import Reporter, SilentReporter, format_bytes, pluralize

if TYPE_CHECKING:
    from diffsynth_core.data.encoded_samples import EncodedSamples
    from diffsynth_core.planning.plan import Plan
    from diffsynth_core.training.rehearsal import Rehearsal
    from diffsynth_core.training.stop import StopRequest

NOT_IN_REAL_RUN = ("rehearse", "dry_run", "gpu_memory", "output_path", "device", "verbose")
Plans = dict[str | None, "Plan"]
"""Stage name (None without stages) -> its plan, in the order of execution."""


def run_session(stages: Sequence[Resolved], flags: dict[str, Any]) -> int:
    """Run one `diffsynth train` command and return the exit code.

    All stages are planned before the first one starts, so that their problems come in one report. For several
    processes, this one plans, and starts the others.
    """
    reporter = ConsoleReporter(quiet=os.environ.get("RANK", "0") != "0")
    first = stages[0].parameters
    if first.rehearse and first.gpu_memory:
        what = "`gpu_memory` has no effect in a rehearsal, whose weights are tiny"
        raise FaultsFound([Problem(what, "pass it with `--dry_run` and without `--rehearse`", wrong_use=True)])
    try:
        if launching.is_launched():
            launching.check_world_size(first.num_processes)
            world_size = launching.world_size()
        else:
            world_size = launching.processes_asked(first.num_processes, first.accelerate_config)
        if stages[0].parameters.dry_run:
            return _show_plans(stages, reporter, world_size)
        if launching.is_launched():
            launching.check_launched()
        with stdout_as_messages(), in_company():
            return (_rehearse if first.rehearse else _train)(stages, flags, reporter, world_size)
    except BaseException as error:
        for line in lines_for_log(error):
            reporter.keep(line)
        raise
    finally:
        reporter.close()


def _make_plans(stages: Sequence[Resolved], reporter: Reporter, world_size: int, without_files: bool = False) -> Plans:
    """Plan the stages to run. Completed stages are skipped without an error, so that a loop that restarts a run until
    it succeeds ends.

    `without_files`: report missing files in the plans instead of raising.

    Raises:
        FaultsFound: with the problems of all stages.
    """
    from diffsynth_core.planning.output import RunComplete

    plans: Plans = {}
    faults: dict[str | None, Sequence[Problem]] = {}
    done: dict[str | None, Problem] = {}
    for resolved in stages:
        try:
            plans[resolved.stage] = _make_plan(resolved, reporter, world_size, without_files)
        except DiffSynthError as error:
            if all(isinstance(problem, RunComplete) for problem in error.problems):
                done[resolved.stage] = error.problems[0]
            else:
                faults[resolved.stage] = error.problems
    problems = _of_stages({resolved.stage: faults.get(resolved.stage, ()) for resolved in stages})
    raise_if_any(missing_in_one(problems))
    for stage, problem in done.items():
        passed_over = f"Stage {stage} is skipped: {problem.message}"
        reporter.info(passed_over if stage else f"Nothing left to do: {problem.message}")
    if len(done) > 1 and not plans:
        reporter.info("Nothing left to do")
    return plans


def _of_stages(found: Mapping[str | None, Sequence[Problem]]) -> list[Problem]:
    """The problems of all stages; a problem that only some stages have names its stage."""
    shared = frozenset[Problem].intersection(*map(frozenset[Problem], found.values()))
    return [
        problem if problem in shared else replace(problem, message=f"stage {stage}: {problem.message}")
        for stage, problems in found.items()
        for problem in problems
    ]


def _make_plan(resolved: Resolved, reporter: Reporter, world_size: int, without_files: bool) -> "Plan":
    from diffsynth_core.dataset_report.preflight import quick_check
    from diffsynth_core.planning.plan import make_plan

    base = model_base_path()
    if resolved.parameters.rehearse:
        from diffsynth_core.training.rehearsal import prepare

        resolved, base = prepare(resolved, reporter)
    return make_plan(resolved, reporter, world_size, base, without_files, quick_check)


def _show_plans(stages: Sequence[Resolved], reporter: ConsoleReporter, world_size: int) -> int:
    """Print for each stage whether it fits, its plan and estimate; last, the flags that make it fit.

    Returns the exit code: 0; that of a failure if something is missing that the run would not download; else
    `EXIT_DOES_NOT_FIT` if a stage does not fit in `gpu_memory`.
    """
    plans = _make_plans(stages, reporter, world_size, without_files=True)
    faults = _of_stages({resolved.stage: _faults(resolved, plans) for resolved in stages})
    code = exit_code_of(FaultsFound(missing_in_one(faults))) if faults else 0
    width = terminal_width()
    estimates = {stage: make_estimate(plan) for stage, plan in plans.items() if not plan.parameters.rehearse}
    verbose = stages[0].parameters.verbose
    for stage, plan in plans.items():
        _tell_plan(stage, plan, estimates.get(stage), reporter, width)
    if plans and not verbose:
        echo_line(wrap_line(ALL, width))
    fits = {stage: estimate.fit for stage, estimate in estimates.items() if estimate.fit}
    for stage, fit in fits.items():
        if changes := list(change_lines(fit, stage)):
            for line in ("", *changes):
                echo(line)
    return code or (0 if all(fit.as_it_is for fit in fits.values()) else EXIT_DOES_NOT_FIT)


def _faults(resolved: Resolved, plans: Plans) -> list[Problem]:
    """What a stage lacks, except files that the run downloads and a dataset that has not been named yet."""
    if resolved.stage not in plans:
        return []
    missing = plans[resolved.stage].missing
    if not downloads_disabled():
        missing = tuple(problem for problem in missing if not isinstance(problem, MissingFiles))
    named = resolved.given("dataset_base_path") or resolved.given("dataset_metadata_path")
    return [problem for problem in missing if named or not isinstance(problem, MissingDataset)]


def _tell_plan(
    stage: str | None, plan: "Plan", estimate: Estimate | None, reporter: ConsoleReporter, width: int | None
) -> None:
    """Print the plan of a stage, beginning with whether it fits, in the matching color."""
    if stage:
        echo_line(f"Stage {stage}")
    if estimate and estimate.fit:
        fit = estimate.fit
        colour = typer.colors.RED if not fit.as_it_is else typer.colors.YELLOW if fit.is_tight else typer.colors.GREEN
        verdict = wrap_line(verdict_line(fit), width)
        plain = "NO_COLOR" in os.environ
        echo_styled(verdict, None if plain else colour, bold=not plain)
    lines = [*summary_lines(plan, estimate), *warning_lines(plan)]
    if plan.parameters.verbose:
        lines += ["", *plan_lines(plan, reporter, estimate is not None), *parameter_lines(plan)]
        lines += estimate_lines(plan, estimate) if estimate else ()
    for line in lines:
        _echo(wrap_line(line, width))


def _echo(line: str) -> None:
    """Print a line of the plan to stdout, warnings in color."""
    text = line.removeprefix(WARNING)
    if text != line:
        echo_styled(WARNING, None if "NO_COLOR" in os.environ else "yellow", newline=False)
    echo_line(text)


def _train(stages: Sequence[Resolved], flags: dict[str, Any], reporter: ConsoleReporter, world_size: int) -> int:
    from diffsynth_core.planning.states_on_disk import state_problems
    from diffsynth_core.training.stop import listen_for_stop

    ensure_downloaded(stages, reporter, lambda quiet: _make_plans(stages, quiet, world_size))
    plans = _make_plans(stages, reporter, world_size)
    if not plans:
        return 0
    raise_if_any(_of_stages({stage: state_problems(plan) for stage, plan in plans.items()}))
    first = next(iter(plans))
    accelerate_config = plans[first].parameters.accelerate_config
    if launching.needs_launch(world_size, accelerate_config):
        return launching.launch(flags, world_size, accelerate_config, plans[first].device)
    # The launcher ends all processes if one has died, and the command that started it reports signals of the user.
    tell_stop = reporter.keep if REPORTS in os.environ else reporter.info
    with listen_for_stop(tell_stop, second_signal_stops=not launching.is_launched()) as stop:
        for stage, plan in plans.items():
            try:
                if stage != first:
                    stop.raise_if_set()
                    _let_go(plan, reporter)
                _announce(stage, plan, reporter)
                if plan.parameters.gpu_memory and (fit := make_estimate(plan).fit):
                    for line in (verdict_line(fit), *trial_lines(fit), *change_lines(fit)):
                        reporter.info(line)
                report = _carry_out(stage, plan, reporter, stop)
            except Interrupted as error:
                if stage == first:
                    raise
                # Before its first step, a run suggests rerunning the command; here, earlier stages have already written
                # runs.
                stopped_by = error.exit_code - SIGNAL_EXIT_BASE
                what = f"stage {stage}: {error.problems[0].message}"
                raise Interrupted(stopped_by, what, "continue with `--resume auto`") from error
            if not reporter.quiet:
                report()
    return 0


def _carry_out(stage: str | None, plan: "Plan", reporter: ConsoleReporter, stop: "StopRequest") -> Callable[[], None]:
    """Train, or precompute encodings; return a function that reports the result in the process that wrote files."""
    if not plan.task.trains:
        from diffsynth_core.training.precompute import precompute

        return partial(_tell_encoded, stage, precompute(plan, reporter, stop), plan, reporter)
    from diffsynth_core.training.checkpointing import conversion_hint
    from diffsynth_core.training.loop import train

    result = train(plan, reporter, stop)

    def report() -> None:  # only the record of the first process lists checkpoints
        checkpoint = result.folder / result.record.checkpoints[-1].file
        _tell_results(stage, checkpoint, result.folder, reporter, conversion_hint(plan, checkpoint))

    return report


def _let_go(plan: "Plan", reporter: ConsoleReporter) -> None:
    """Between stages: free the memory of the last stage, and close its log."""
    import torch

    from diffsynth_core.training.encode import free_device_memory

    free_device_memory(torch.device(plan.device))
    reporter.close()


def _rehearse(stages: Sequence[Resolved], flags: dict[str, Any], reporter: ConsoleReporter, world_size: int) -> int:
    from diffsynth_core.training.stop import listen_for_stop

    if world_size > launching.world_size():
        what = f"a rehearsal runs in one process, but {world_size} are requested"
        raise DiffSynthError(what, "remove `--num_processes` and `--accelerate_config`")
    if world_size > 1:
        raise DiffSynthError(
            f"a rehearsal runs in one process, but this is one of {world_size}", "rehearse without the launcher"
        )
    if len(stages) > 1:  # each is planned and printed again before it starts
        _make_plans(stages, SilentReporter(), world_size)
    synthetic_media = None
    with listen_for_stop(reporter.info) as stop:
        for resolved in stages:
            rehearsal = _rehearse_stage(resolved, reporter, stop)
            synthetic_media = rehearsal.synthetic_media
            reporter.close()
    real = {name: value for name, value in flags.items() if name in SETTINGS and name not in NOT_IN_REAL_RUN}
    if synthetic_media:
        real["dataset_base_path"] = f"YOUR_{synthetic_media.upper()}"
    echo("The real run:")
    line = command_line(real, f"{_own_command()} train", overriding=True)
    echo(f"  {line}".replace("\n", "\n  "))
    return 0


def _own_command() -> str:
    """The command that runs this program again: `diffsynth`, or its path if PATH has no or another `diffsynth`."""
    called, found = Path(sys.argv[0]), shutil.which("diffsynth")
    if called.name != "diffsynth" or (found and Path(found).resolve() == called.resolve()):
        return "diffsynth"
    return shlex.quote(str(called))


def _rehearse_stage(resolved: Resolved, reporter: ConsoleReporter, stop: "StopRequest") -> "Rehearsal":
    """Rehearse one stage and print what that verified."""
    from diffsynth_core.dataset_report.preflight import quick_check
    from diffsynth_core.training.rehearsal import how_to_repeat, rehearse

    stage = resolved.stage
    try:
        stop.raise_if_set()
        rehearsal = rehearse(resolved, reporter, stop, lambda plan: _announce(stage, plan, reporter), quick_check)
    except Interrupted as error:
        # A rehearsal always starts over, so the hint to resume does not apply.
        stopped_by = error.exit_code - SIGNAL_EXIT_BASE
        raise Interrupted(stopped_by, "the rehearsal was interrupted", how_to_repeat(resolved)) from error
    reporter.result(f"The rehearsal of stage {stage} proved:" if stage else "The rehearsal proved:")
    for proof in rehearsal.proofs:
        reporter.result(f"  - {proof}")
    _tell_results(stage, rehearsal.checkpoint, rehearsal.result.folder, reporter)
    return rehearsal


def _announce(stage: str | None, plan: "Plan", reporter: ConsoleReporter) -> None:
    """Print the summary of a plan; the full plan goes to the log."""
    for line in (*([f"Stage {stage}"] if stage else []), *summary_lines(plan)):
        reporter.info(line)
    for line in warning_lines(plan):
        text = line.removeprefix(WARNING)
        (reporter.info if text == line else reporter.warn)(text)
    for line in plan_lines(plan, reporter):
        (reporter.info if plan.parameters.verbose else reporter.keep)(line)


def _tell_results(
    stage: str | None, checkpoint: Path, folder: Path, reporter: ConsoleReporter, use: str | None = None
) -> None:
    if stage:
        reporter.result(f"Stage       {stage}")
    reporter.result(f"Checkpoint  {checkpoint}")
    if use:
        reporter.result(f"ComfyUI     {use}")
    reporter.result(f"Metrics     {folder / METRICS}")
    reporter.result(f"Log         {folder / LOG}")


def _tell_encoded(stage: str | None, encoded: "EncodedSamples", plan: "Plan", reporter: ConsoleReporter) -> None:
    if stage:
        reporter.result(f"Stage       {stage}")
    size = sum(dict(encoded.paths()).values())
    reporter.result(f"Encoded     {encoded.folder} ({pluralize(len(encoded.samples), 'sample')}, {format_bytes(size)})")
    reporter.result(f"Train with  --task {plan.task.train_task} --dataset_base_path {encoded.folder}")
