"""One training command in the terminal: plan, rehearse or train, and tell how it ended."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.plan_text import plan_lines
from diffsynth_core.checkpoints.run_folder import LOG, METRICS
from diffsynth_core.config.documents import command_line
from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import SIGNAL_EXIT_BASE, DiffSynthError, Interrupted
from diffsynth_core.files import model_base_path

if TYPE_CHECKING:
    from diffsynth_core.planning.plan import Plan

NOT_IN_REAL_RUN = ("rehearse", "dry_run", "output_path", "device")


def run_session(resolved: Resolved, flags: dict[str, Any], world_size: int) -> int:
    """Carry out one `diffsynth train`; returns the exit code."""
    reporter = ConsoleReporter(quiet=os.environ.get("RANK", "0") != "0")
    try:
        if resolved.parameters.dry_run:
            return _show_plan(resolved, reporter, world_size)
        return (
            _rehearse(resolved, flags, reporter, world_size)
            if resolved.parameters.rehearse
            else _train(resolved, reporter, world_size)
        )
    finally:
        reporter.close()


def _show_plan(resolved: Resolved, reporter: ConsoleReporter, world_size: int) -> int:
    from diffsynth_core.planning.plan import make_plan

    base = model_base_path()
    if resolved.parameters.rehearse:
        from diffsynth_core.training.rehearsal import prepare

        resolved, base = prepare(resolved, reporter)
    plan = make_plan(resolved, reporter, world_size, base)
    for line in plan_lines(plan, reporter):
        typer.echo(line)
    return 0


def _train(resolved: Resolved, reporter: ConsoleReporter, world_size: int) -> int:
    from diffsynth_core.planning.plan import make_plan
    from diffsynth_core.training.loop import train
    from diffsynth_core.training.stop import listen_for_stop

    plan = make_plan(resolved, reporter, world_size)
    _announce(plan, reporter)
    with listen_for_stop(reporter.info) as stop:
        result = train(plan, reporter, stop)
    if not reporter.quiet:
        _tell_results(result.folder / result.record.checkpoints[-1].file, result.folder)
    return 0


def _rehearse(resolved: Resolved, flags: dict[str, Any], reporter: ConsoleReporter, world_size: int) -> int:
    from diffsynth_core.training.rehearsal import rehearse
    from diffsynth_core.training.stop import listen_for_stop

    if world_size > 1:
        raise DiffSynthError(
            f"a rehearsal runs in one process, this is one of {world_size}", "rehearse without the launcher"
        )
    with listen_for_stop(reporter.info) as stop:
        try:
            rehearsal = rehearse(resolved, reporter, stop, lambda plan: _announce(plan, reporter))
        except Interrupted as error:
            # What a stopped run says of resuming does not hold here: every rehearsal is a run of its own.
            stopped_by = error.exit_code - SIGNAL_EXIT_BASE
            raise Interrupted(stopped_by, "the rehearsal was stopped", "give the same command again") from error
    typer.echo("The rehearsal proved:")
    for proof in rehearsal.proofs:
        typer.echo(f"  - {proof}")
    _tell_results(rehearsal.checkpoint, rehearsal.result.folder)
    real = {name: value for name, value in flags.items() if name in SETTINGS and name not in NOT_IN_REAL_RUN}
    if rehearsal.drew_pictures:
        real["dataset_base_path"] = "YOUR_PICTURES"
    typer.echo("The real run:")
    typer.echo(f"  {command_line(real)}".replace("\n", "\n  "))
    return 0


def _announce(plan: "Plan", reporter: ConsoleReporter) -> None:
    for line in plan_lines(plan, reporter):
        reporter.info(line)


def _tell_results(checkpoint: Path, folder: Path) -> None:
    typer.echo(f"Checkpoint  {checkpoint}")
    typer.echo(f"Metrics     {folder / METRICS}")
    typer.echo(f"Log         {folder / LOG}")
