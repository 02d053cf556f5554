"""One `train` command in the terminal: plan, rehearse or train stage by stage, and report how each ended."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth_cli import REPORTS, launching
from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.errors import exit_code_of, lines_for_log, sentence_of
from diffsynth_cli.launching import Launch
from diffsynth_cli.printing import echo, echo_line, echo_styled
from diffsynth_cli.ranks import in_company
from diffsynth_cli.rendezvous import errors_sent, tell_complete
from diffsynth_cli.streams import stdout_as_messages
from diffsynth_cli.text.download import plan_lines as download_lines
from diffsynth_cli.text.estimate import (
    Estimate,
    candidate_lines,
    engine_lines,
    estimate_lines,
    make_estimate,
    option_lines,
    verdict_line,
)
from diffsynth_cli.text.plan import WARNING, parameter_lines, plan_lines, warning_lines
from diffsynth_cli.text.probe import probe_lines
from diffsynth_cli.text.summary import ALL, summary_lines
from diffsynth_cli.text.wrapping import terminal_width, wrap_line
from diffsynth_core.checkpoints.run_folder import LOG, METRICS, PAGE
from diffsynth_core.config.documents import command_line, format_value
from diffsynth_core.config.parameters import SETTINGS, as_plain
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import EXIT_DOES_NOT_FIT, DiffSynthError, FaultsFound, OutOfTime, Problem, raise_if_any
from diffsynth_core.hub.download_plan import DownloadPlan
from diffsynth_core.planning.machine.engines import engine_of_environment
from diffsynth_core.progress import format_bytes, pluralize
from diffsynth_core.session import Plans, Session, StageResult

if TYPE_CHECKING:
    from diffsynth_core.data.encoded_samples import EncodedSamples
    from diffsynth_core.planning.plan import RunPlan


def run_session(stages: Sequence[Resolved], flags: dict[str, Any]) -> int:
    """Run one `diffsynth train` command and return the exit code.

    All stages are planned before the first one starts, so that their problems come in one report. For several
    processes, this one plans, and starts the others.
    """
    reporter = ConsoleReporter(quiet=os.environ.get("RANK", "0") != "0")
    first = stages[0].parameters
    if first.rehearse:
        raise_if_any(list(_without_effect_in_rehearsals(stages[0])))
    try:
        if launching.is_launched():
            launching.check_world_size(first.num_processes)
            launch = launching.Launch(processes=launching.world_size(), engine=engine_of_environment(os.environ))
        else:
            launch = launching.Launch.of(first)
        stages = [replace(stage, problems=(*stage.problems, *launch.problems)) for stage in stages]
        session = Session(stages, reporter, launch.processes, launch.engine, launch.is_first)
        if first.dry_run:
            return _show_plans(session, reporter)
        if launching.is_launched():
            launching.check_launched()
        with stdout_as_messages(), in_company():
            return _rehearse(session, flags, reporter) if first.rehearse else _train(session, flags, reporter, launch)
    except BaseException as error:
        for line in lines_for_log(error):
            reporter.keep(line)
        raise
    finally:
        reporter.close()


def _without_effect_in_rehearsals(resolved: Resolved) -> Iterator[Problem]:
    """The problems of flags about the real weights and the real time of a run."""
    given = [name for name in ("gpu_memory", "fit", "max_time") if resolved.origin(name).kind == "flag"]
    for name in given:
        what = f"`{name}` has no effect in a rehearsal, whose weights are tiny"
        yield Problem(what, "pass it with `--dry_run` and without `--rehearse`", wrong_use=True)


def _show_plans(session: Session, reporter: ConsoleReporter) -> int:
    """Print for each stage whether it fits, its plan and estimate; last, the flags that make it fit.

    Returns the exit code: 0; that of a failure if something is missing that the run would not download; else
    `EXIT_DOES_NOT_FIT` if a stage does not fit in `gpu_memory`.
    """
    plans = session.plan(without_files=True)
    lacking = session.lacks(plans)
    code = exit_code_of(FaultsFound(lacking)) if lacking else 0
    width = terminal_width()
    estimates = {stage: make_estimate(plan) for stage, plan in plans.items() if not plan.parameters.rehearse}
    verbose = session.stages[0].parameters.verbose
    for stage, plan in plans.items():
        _show_plan(stage, plan, estimates.get(stage), reporter, width)
    if plans and not verbose:
        echo_line(wrap_line(ALL, width))
    fits = {stage: estimate.fit for stage, estimate in estimates.items() if estimate.fit}
    for stage, fit in fits.items():
        if changes := list(option_lines(fit, stage)):
            for line in ("", *changes):
                echo(line)
    return code or (0 if all(fit.fits_unchanged for fit in fits.values()) else EXIT_DOES_NOT_FIT)


def _show_plan(
    stage: str | None, plan: "RunPlan", estimate: Estimate | None, reporter: ConsoleReporter, width: int | None
) -> None:
    """Print the plan of a stage, beginning with whether it fits, in the matching color."""
    if stage:
        echo_line(f"Stage {stage}")
    if estimate and estimate.fit:
        fit = estimate.fit
        color = (
            typer.colors.RED if not fit.fits_unchanged else typer.colors.YELLOW if fit.is_tight else typer.colors.GREEN
        )
        verdict = wrap_line(verdict_line(fit), width)
        plain = "NO_COLOR" in os.environ
        echo_styled(verdict, None if plain else color, bold=not plain)
    lines = [*summary_lines(plan, estimate), *warning_lines(plan)]
    if estimate and estimate.fit and estimate.engines:
        lines += ["", *engine_lines(plan, estimate.engines, estimate.fit.limit)]
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


def _train(session: Session, flags: dict[str, Any], reporter: ConsoleReporter, launch: Launch) -> int:
    from diffsynth_core.stop import listen_for_stop

    # The process that downloads reports it, whichever rank it has.
    messages = ConsoleReporter() if reporter.quiet else reporter

    def show(download: DownloadPlan) -> None:
        for line in download_lines(download):
            messages.info(line)

    with errors_sent(launch.rendezvous):
        session.download(show, messages)
        plans = session.plan()
        if launch.is_needed and plans:
            session.check_machine(plans)  # without a launcher, `Session.train` does
            flags = _with_fitted(flags, plans)
    if not plans:
        if launch.rendezvous:
            tell_complete(launch.rendezvous)
        return 0
    first = next(iter(plans.values()))
    if launch.is_needed:
        return launching.launch(flags, launch, first.machine.device)

    def announce(stage: str | None, plan: "RunPlan") -> None:
        if plan is not first:
            reporter.close()  # the log of the stage before
        _announce(stage, plan, reporter)
        if plan.parameters.gpu_memory and (fit := make_estimate(plan).fit):
            for line in (verdict_line(fit), *candidate_lines(fit), *option_lines(fit)):
                reporter.info(line)

    # The launcher ends all processes if one has died, and the command that started it reports signals of the user.
    report_stop = reporter.keep if REPORTS in os.environ else reporter.info
    with listen_for_stop(report_stop, second_signal_stops=not launching.is_launched()) as stop:
        try:
            for result in session.train(plans, stop, announce):
                if not reporter.quiet:
                    _show_result(result, reporter)
        except OutOfTime as stopped:
            reporter.info(sentence_of(stopped))
    return 0


def _with_fitted(flags: dict[str, Any], plans: Plans) -> dict[str, Any]:
    """Flags for the processes of a run, which do what `fit` found here instead of looking for it again.

    Raises:
        DiffSynthError: if that differs between stages, for all of which a flag holds.
    """
    found = [{name: as_plain(plan.parameters)[name] for name in plan.fitted} for plan in plans.values()]
    if any(values != found[0] for values in found):
        what = (
            f"`fit` changes the stages {', '.join(map(str, plans))} differently, which several processes cannot follow"
        )
        raise DiffSynthError(what, "run each by itself with `--only`")
    values = {name: value if isinstance(value, bool) else format_value(value) for name, value in found[0].items()}
    return {name: value for name, value in flags.items() if name != "fit"} | values


def _rehearse(session: Session, flags: dict[str, Any], reporter: ConsoleReporter) -> int:
    from diffsynth_core.stop import listen_for_stop

    world_size = session.world_size
    if world_size > launching.world_size():
        what = f"a rehearsal runs in one process, but {world_size} are requested"
        raise DiffSynthError(what, "remove `--num_processes` and `--accelerate_config`")
    if world_size > 1:
        raise DiffSynthError(
            f"a rehearsal runs in one process, but this is one of {world_size}", "rehearse without the launcher"
        )
    synthetic_media = None
    with listen_for_stop(reporter.info) as stop:
        for stage, rehearsal in session.rehearse(stop, partial(_announce, reporter=reporter)):
            reporter.result(f"The rehearsal of stage {stage} proved:" if stage else "The rehearsal proved:")
            for proof in rehearsal.proofs:
                reporter.result(f"  - {proof}")
            _show_files(stage, rehearsal.checkpoint, rehearsal.result.folder, reporter)
            synthetic_media = rehearsal.synthetic_media
            reporter.close()
    real = {name: value for name, value in flags.items() if name in SETTINGS and SETTINGS[name].rehearsal != "own"}
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


def _announce(stage: str | None, plan: "RunPlan", reporter: ConsoleReporter) -> None:
    """Print the summary of a plan; the full plan goes to the log."""
    for line in (*([f"Stage {stage}"] if stage else []), *summary_lines(plan)):
        reporter.info(line)
    for line in warning_lines(plan):
        text = line.removeprefix(WARNING)
        (reporter.info if text == line else reporter.warn)(text)
    for line in plan_lines(plan, reporter):
        (reporter.info if plan.parameters.verbose else reporter.keep)(line)


def _show_result(result: StageResult, reporter: ConsoleReporter) -> None:
    if result.probed:
        for line in ([f"Stage       {result.stage}"] if result.stage else []) + list(
            probe_lines(result.plan, result.probed)
        ):
            reporter.result(line)
    elif result.encoded:
        _show_encoded(result.stage, result.encoded, result.plan, reporter)
    elif result.checkpoint:
        from diffsynth_core.training.checkpointing import conversion_hint

        use = conversion_hint(result.plan, result.checkpoint)
        _show_files(result.stage, result.checkpoint, result.folder, reporter, use)


def _show_files(
    stage: str | None, checkpoint: Path, folder: Path, reporter: ConsoleReporter, use: str | None = None
) -> None:
    if stage:
        reporter.result(f"Stage       {stage}")
    reporter.result(f"Checkpoint  {checkpoint}")
    if use:
        reporter.result(f"ComfyUI     {use}")
    reporter.result(f"Metrics     {folder / METRICS}")
    reporter.result(f"Page        {folder / PAGE}")
    reporter.result(f"Log         {folder / LOG}")


def _show_encoded(stage: str | None, encoded: "EncodedSamples", plan: "RunPlan", reporter: ConsoleReporter) -> None:
    if stage:
        reporter.result(f"Stage       {stage}")
    size = sum(dict(encoded.paths()).values())
    reporter.result(f"Encoded     {encoded.folder} ({pluralize(len(encoded.samples), 'sample')}, {format_bytes(size)})")
    reporter.result(f"Train with  --task {plan.task.train_task} --dataset_base_path {encoded.folder}")
