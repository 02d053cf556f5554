"""The runs of one recipe, from its parameters to the files that they write: plan, download, train or rehearse.

The command line is one user of it, and a notebook another:

    from diffsynth_core.session import Session

    session = Session.of(recipe="qwen-image-lora", dataset_base_path="my_images", max_steps=100)
    session.download()
    for result in session.train():
        print(result.checkpoint)
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_core.config.durations import duration_seconds
from diffsynth_core.config.resolve import Resolved, resolve_stages, with_values_of_launcher
from diffsynth_core.errors import SIGNAL_EXIT_BASE, DiffSynthError, Interrupted, OutOfTime, Problem, raise_if_any
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.client import downloads_disabled
from diffsynth_core.hub.download import download_missing
from diffsynth_core.hub.download_plan import DownloadPlan
from diffsynth_core.hub.model_files import MissingFiles, missing_in_one
from diffsynth_core.planning.data.dataset import MissingDataset
from diffsynth_core.planning.machine.engines import REPLICATED, EngineChoice, engine_of_environment
from diffsynth_core.planning.model.required_files import files_of_stages
from diffsynth_core.progress import Reporter, SilentReporter, Task

if TYPE_CHECKING:
    from diffsynth_core.data.encoded_samples import EncodedSamples
    from diffsynth_core.planning.plan import RunPlan
    from diffsynth_core.rehearsal.rehearse import Rehearsal
    from diffsynth_core.stop import StopRequest
    from diffsynth_core.training.probe import Probed

Plans = Mapping[str | None, "RunPlan"]
"""Stage name (None without stages) -> its plan, in the order of execution."""
Announce = Callable[[str | None, "RunPlan"], None]
"""Called with each stage and its plan before it starts."""


@dataclass(frozen=True)
class StageResult:
    """What a stage wrote.

    `checkpoint`: its last checkpoint; None in all processes but the first, and where the output is `encoded`, or
    nothing but what was `probed`.
    """

    stage: str | None
    plan: "RunPlan"
    folder: Path
    checkpoint: Path | None = None
    encoded: "EncodedSamples | None" = None
    probed: "Probed | None" = None


class Session:
    """The runs of one command: a run, or one for each stage.

    `world_size`: the number of processes that train together, of which this is one. `engine`: what distributes a step
    over them. `is_first`: this is the first of them or starts it, and so looks at the places that the run is copied to.
    """

    def __init__(
        self,
        stages: Sequence[Resolved],
        reporter: Reporter | None = None,
        world_size: int = 1,
        engine: EngineChoice = REPLICATED,
        is_first: bool = True,
    ) -> None:
        self.stages = [with_values_of_launcher(stage, engine.stated) for stage in stages]
        self.reporter: Reporter = reporter or SilentReporter()
        self.world_size, self.engine, self.is_first = world_size, engine, is_first

    @classmethod
    def of(cls, reporter: Reporter | None = None, **parameters: Any) -> "Session":
        """A session with these parameters, in one process; `recipe`, `config` and `only` among them.

        Problems with their values are raised by `plan`, together with all others.
        """
        stages = resolve_stages(parameters)
        own = [replace(one, problems=(*one.problems, *_launch_problems(one))) for one in stages]
        return cls(own, reporter, engine=engine_of_environment(os.environ))

    def plan(self, without_files: bool = False, reporter: Reporter | None = None) -> Plans:
        """Plan all stages, so that their problems come in one report; completed stages are left out.

        A completed stage is no error, so that a loop that restarts a run until it succeeds ends.

        Args:
            without_files: list missing files, dataset and device in the plans instead of raising.
            reporter: in place of the session's.

        Raises:
            FaultsFound: with the problems of all stages.
        """
        from diffsynth_core.planning.output.folder import RunComplete

        reporter = reporter or self.reporter
        plans: dict[str | None, RunPlan] = {}
        faults: dict[str | None, Sequence[Problem]] = {}
        completed: dict[str | None, Problem] = {}
        for resolved in self.stages:
            try:
                plans[resolved.stage] = self._plan_stage(resolved, reporter, without_files)
            except DiffSynthError as error:
                if all(isinstance(problem, RunComplete) for problem in error.problems):
                    completed[resolved.stage] = error.problems[0]
                else:
                    faults[resolved.stage] = error.problems
            if not without_files and resolved.stage not in completed:
                unreachable = _unreachable(resolved) if self.is_first else ()
                faults[resolved.stage] = [*faults.get(resolved.stage, ()), *unreachable]
        raise_if_any(
            missing_in_one(_name_stages({resolved.stage: faults.get(resolved.stage, ()) for resolved in self.stages}))
        )
        for stage, problem in completed.items():
            skipped = f"Stage {stage} is skipped: {problem.message}"
            reporter.info(skipped if stage else f"Nothing left to do: {problem.message}")
        if len(completed) > 1 and not plans:
            reporter.info("Nothing left to do")
        return plans

    def lacks(self, plans: Plans) -> list[Problem]:
        """What planned stages lack, except files that would be downloaded and a dataset that has not been named yet."""

        def of_stage(resolved: Resolved) -> Sequence[Problem]:
            missing = plans[resolved.stage].missing if resolved.stage in plans else ()
            if not downloads_disabled():
                missing = tuple(problem for problem in missing if not isinstance(problem, MissingFiles))
            named = resolved.origin("dataset_base_path").is_given or resolved.origin("dataset_metadata_path").is_given
            return [problem for problem in missing if named or not isinstance(problem, MissingDataset)]

        return missing_in_one(_name_stages({resolved.stage: of_stage(resolved) for resolved in self.stages}))

    def download(self, show: Callable[[DownloadPlan], None] = lambda _: None, messages: Reporter | None = None) -> None:
        """Download missing model files, once everything else about the runs has been checked.

        Nothing is downloaded for runs that would then be rejected.

        Args:
            show: called with the list of files before anything is downloaded.
            messages: the reporter of the process that downloads, in place of the session's.

        Raises:
            FaultsFound: with all problems, missing files included, if there are others; or if a download fails.
            Interrupted: after Ctrl-C; the downloaded parts are kept.
        """
        if not any(resolved.incomplete for resolved in self.stages):
            plan = partial(self.plan, reporter=_WithoutMessages(self.reporter))
            wanted, base = files_of_stages(self.stages), model_base_path()
            download_missing(wanted, base, plan, self.reporter, messages or self.reporter, show)

    def check_machine(self, plans: Plans) -> None:
        """Look at what a run needs besides its files; the first process creates the repositories that it uploads to.

        Raises:
            FaultsFound: if the states of a run do not fit the disk of its output folder, what waits in host memory does
                not fit there, or a hub refuses to create a repository.
        """
        from diffsynth_core.planning.memory.host_memory import host_problems
        from diffsynth_core.planning.output.states_on_disk import state_problems
        from diffsynth_core.planning.output.uploads import create_repository

        if plans:
            found = {stage: [*state_problems(plan), *host_problems(plan)] for stage, plan in plans.items()}
            raise_if_any(_name_stages(found))
            if self.is_first:
                raise_if_any(_name_stages({stage: create_repository(plan.parameters) for stage, plan in plans.items()}))

    def train(
        self, plans: Plans | None = None, stop: "StopRequest | None" = None, announce: Announce = lambda *_: None
    ) -> Iterator[StageResult]:
        """Carry out the stages one after the other, each when its result is asked for.

        Args:
            plans: of `plan`; None: plan now.
            stop: set by a signal; None: Ctrl-C ends the step at once, which loses the steps after the last state.

        Raises:
            FaultsFound: as `plan` and `check_machine`.
            Interrupted: after a stop; the state has been saved.
            OutOfTime: when the time of `max_time`, which begins here and is for all stages, ends; as after a stop.
        """
        from diffsynth_core.stop import StopRequest

        plans = self.plan() if plans is None else plans
        self.check_machine(plans)
        stop = StopRequest() if stop is None else stop  # one that nobody has set is false
        if max_time := self.stages[0].parameters.max_time:
            stop.limit_time(duration_seconds(max_time))
        for number, (stage, plan) in enumerate(plans.items()):
            try:
                if number:
                    stop.raise_if_set()
                    _free_memory(plan)
                announce(stage, plan)
                yield self._carry_out(stage, plan, stop)
            except (Interrupted, OutOfTime) as error:
                if not number:
                    raise
                # Before its first step, a run suggests rerunning the command; here, earlier stages have already
                # written runs, which only `--resume auto` continues.
                what, hint = f"stage {stage}: {error.problems[0].message}", "continue with `--resume auto`"
                if isinstance(error, OutOfTime):
                    raise OutOfTime(what, hint) from error
                raise Interrupted(error.exit_code - SIGNAL_EXIT_BASE, what, hint) from error

    def rehearse(
        self, stop: "StopRequest | None" = None, announce: Announce = lambda *_: None
    ) -> Iterator[tuple[str | None, "Rehearsal"]]:
        """Rehearse the stages one after the other, each when its result is asked for. The parameter `rehearse` is set.

        Raises:
            FaultsFound: as `plan`, before the first stage starts.
            DiffSynthError: if a rehearsal does not prove what it should.
            Interrupted: after a stop.
        """
        from diffsynth_core.rehearsal.rehearse import how_to_repeat, rehearse
        from diffsynth_core.stop import StopRequest

        stop = StopRequest() if stop is None else stop  # one that nobody has set is false
        if len(self.stages) > 1:  # each is planned again, with its messages, before it starts
            self.plan(reporter=SilentReporter())
        for resolved in self.stages:
            try:
                stop.raise_if_set()
                found = rehearse(resolved, self.reporter, stop, partial(announce, resolved.stage))
            except Interrupted as error:
                # A rehearsal always starts over, so the hint to resume does not apply.
                stopped_by = error.exit_code - SIGNAL_EXIT_BASE
                raise Interrupted(stopped_by, "the rehearsal was interrupted", how_to_repeat(resolved)) from error
            yield resolved.stage, found

    def _plan_stage(self, resolved: Resolved, reporter: Reporter, without_files: bool) -> "RunPlan":
        from diffsynth_core.planning.memory.swap_choice import with_chosen_blocks
        from diffsynth_core.planning.plan import make_plan

        base = model_base_path()
        if resolved.parameters.rehearse:
            from diffsynth_core.rehearsal.preparation import prepare

            resolved, base = prepare(resolved, reporter)
        if resolved.parameters.fit and not resolved.parameters.rehearse:
            from diffsynth_core.planning.memory.fitted import make_it_fit

            def plan_of(changed: Resolved) -> "RunPlan":
                return make_plan(
                    changed, SilentReporter(), self.world_size, base, without_files=True, engine=self.engine
                )

            resolved = make_it_fit(resolved, plan_of)
        return with_chosen_blocks(make_plan(resolved, reporter, self.world_size, base, without_files, self.engine))

    def _carry_out(self, stage: str | None, plan: "RunPlan", stop: "StopRequest") -> StageResult:
        """Train, precompute encodings, or probe."""
        if not plan.task.trains:
            from diffsynth_core.training.precompute import precompute

            encoded = precompute(plan, self.reporter, stop)
            return StageResult(stage, plan, encoded.folder, encoded=encoded)
        if plan.parameters.probe:
            from diffsynth_core.training.probe import probe

            return StageResult(stage, plan, plan.parameters.output_path, probed=probe(plan, self.reporter, stop))
        from diffsynth_core.training.loop import train

        result = train(plan, self.reporter, stop)
        written = result.record.checkpoints  # only the record of the first process lists them
        return StageResult(stage, plan, result.folder, result.folder / written[-1].file if written else None)


def _launch_problems(resolved: Resolved) -> list[Problem]:
    """The problems of parameters that only the command follows, because they are about starting processes."""
    parameters = resolved.parameters
    asked = {"num_processes": (parameters.num_processes or 1) > 1, "accelerate_config": parameters.accelerate_config}
    what = "`{name}` has no effect in a session, which trains in the process that it is called in"
    hint = "remove it, or train with `diffsynth train`, which starts the processes"
    return [Problem(what.format(name=name), hint, wrong_use=True) for name, value in asked.items() if value]


def _unreachable(resolved: Resolved) -> list[Problem]:
    """The problems of other places that the run is copied to."""
    from diffsynth_core.planning.output.mirror import unreachable_mirror
    from diffsynth_core.planning.output.uploads import refused_account

    if resolved.parameters.rehearse:
        return []
    return [*unreachable_mirror(resolved.parameters), *refused_account(resolved.parameters)]


def _name_stages(found: Mapping[str | None, Sequence[Problem]]) -> list[Problem]:
    """The problems of all stages; a problem that only some stages have names its stage."""
    shared = frozenset[Problem].intersection(*map(frozenset[Problem], found.values()))
    return [
        problem if problem in shared else replace(problem, message=f"stage {stage}: {problem.message}")
        for stage, problems in found.items()
        for problem in problems
    ]


def _free_memory(plan: "RunPlan") -> None:
    """Between stages: free the device memory of the last one."""
    import torch

    from diffsynth_core.planning.model.loading import free_device_memory

    free_device_memory(torch.device(plan.machine.device))


class _WithoutMessages(SilentReporter):
    """Shows progress but drops messages, for work that is done a second time with them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        with self._reporter.task(label, total, unit, done) as task:
            yield task
