"""Several processes: the same `diffsynth train` command again, started by accelerate's launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from diffsynth_cli import REPORTS, ranks
from diffsynth_cli.errors import Ending
from diffsynth_cli.printing import echo
from diffsynth_cli.rendezvous import Rendezvous, errors_sent, wait_for_machines
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.recipes import launcher_presets
from diffsynth_core.config.yaml_files import read_yaml
from diffsynth_core.errors import SIGNAL_EXIT_BASE, STOPPING_SIGNALS, DiffSynthError, FaultsFound, Problem, suggest
from diffsynth_core.planning.machine.engines import (
    REPLICATED,
    SHARDING_VARIABLES,
    EngineChoice,
    engine_of_configuration,
)
from diffsynth_core.progress import pluralize, verb
from diffsynth_core.stop import FINISHING

LAUNCHER = (sys.executable, "-m", "diffsynth_cli.launcher")
"""Command of the process that starts accelerate's launcher."""
LAUNCHERS = (LAUNCHER[-1], "accelerate.commands.launch")
"""Modules that start processes: our launcher and the one it builds on."""
STARTED_ALONE = ("NO", "MULTI_CPU")
"""Values of `distributed_type` in an accelerate configuration for which its launcher starts a single process."""


def world_size() -> int:
    """The number of processes.

    Raises:
        FaultsFound: if `WORLD_SIZE` is not a positive integer.
    """
    stated = os.environ.get("WORLD_SIZE", "1")
    if not stated.isdecimal() or int(stated) < 1:
        raise FaultsFound(
            [Problem(f"WORLD_SIZE is `{stated}`, expected a positive integer", "unset it", wrong_use=True)]
        )
    return int(stated)


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", *SHARDING_VARIABLES))


def check_launched() -> None:
    """Check that the environment of a process of several has everything needed to find the others.

    Raises:
        FaultsFound: if only `WORLD_SIZE` is set, as in the environment of some containers.
    """
    if world_size() == 1:
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        what = f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} {verb(len(missing), 'is', 'are')} not set"
        hint = f"unset WORLD_SIZE and pass `--num_processes {world_size()}`, or launch with `accelerate launch`"
        raise FaultsFound([Problem(f"{what}: no launcher started this process", hint, wrong_use=True)])


def check_world_size(num_processes: int | None) -> None:
    """Compare the number of processes with the number requested, by the parameter or from the launcher.

    Raises:
        DiffSynthError: if they differ: in some cases the launcher starts only one process.
    """
    for asked, where in ((num_processes, "`num_processes`"), (asked_of_launcher(), "the launcher")):
        if asked is not None and asked != world_size():
            hint = (
                f"start them with `diffsynth train --num_processes {asked}`, or with `accelerate launch --multi_gpu`, with "
                "ACCELERATE_USE_CPU=true in the environment if there is no GPU"
            )
            what = f"{where} requests {pluralize(asked, 'process', 'processes')}, but the world size is {world_size()}"
            raise FaultsFound([Problem(what, hint, wrong_use=True)])


def find_config(name: str | None) -> Path | None:
    """The accelerate configuration to use: a preset by name, a file, or the user's default, if any.

    Raises:
        DiffSynthError: if there is neither a preset nor a file of that name.
    """
    if name is None:
        default = default_config()
        return default if default.is_file() else None
    presets = launcher_presets()
    path = presets.get(name, Path(name))
    if not path.is_file():
        near = suggest(name, presets)
        hint = f"did you mean `{near}`?" if near else f"pass a file, or one of {', '.join(presets)}"
        raise DiffSynthError(f"there is no accelerate configuration `{name}` (`accelerate_config`)", hint)
    return path


def default_config() -> Path:
    """Where `accelerate config` writes (`accelerate.commands.config.config_args.default_yaml_config_file`)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "accelerate" / "default_config.yaml"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes of a run and the engine that distributes its steps over them, as the parameters ask.

    `processes`: on all machines. `config`: the accelerate configuration; `is_asked`: by a parameter. `problems`: why
    the processes cannot be started, or would not find each other.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    config: Path | None = None
    is_asked: bool = False
    engine: EngineChoice = REPLICATED
    distributed_type: str = "NO"
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, parameters: Parameters) -> "Launch":
        """One process without parameters about it, whatever the user's default configuration states. Parameters take
        precedence over the configuration.

        Raises:
            DiffSynthError: if the configuration is missing.
        """
        machines = parameters.num_machines
        if not parameters.accelerate_config and parameters.num_processes in (None, 1) and machines in (None, 1):
            return cls(problems=tuple(_without_machines(parameters)))
        path = find_config(parameters.accelerate_config)
        settings = read_yaml(path) if path else {}

        def asked(name: str, default: Any = None) -> Any:
            value = getattr(parameters, name)
            return settings.get(name) or default if value is None else value

        launch = cls(
            processes=int(asked("num_processes", 1)),
            machines=int(asked("num_machines", 1)),
            machine_rank=int(asked("machine_rank", 0)),
            main_process_ip=asked("main_process_ip"),
            main_process_port=asked("main_process_port"),
            config=path,
            is_asked=parameters.accelerate_config is not None,
            engine=engine_of_configuration(settings, str(path)),
            distributed_type=str(settings.get("distributed_type") or "NO"),
        )
        found = _without_machines(parameters) if launch.machines == 1 else launch._of_machines()
        return replace(launch, problems=tuple(found))

    def _of_machines(self) -> Iterator[Problem]:
        """Why several machines cannot train together."""
        missing = [name for name in ("main_process_ip", "main_process_port") if getattr(self, name) is None]
        if missing:
            what = f"{self.machines} machines need {' and '.join(f'`{name}`' for name in missing)} to find each other"
            hint = "pass the address and a free port of machine 0, the same on all machines"
            yield Problem(what, hint, wrong_use=True)
        if self.machine_rank >= self.machines:
            what = f"`machine_rank` is {self.machine_rank}, but {self.machines} machines have the ranks 0 to {self.machines - 1}"
            yield Problem(what, "pass the rank of this machine", wrong_use=True)
        if self.processes % self.machines:
            what = f"`num_processes` {self.processes} is not a multiple of {self.machines} machines"
            yield Problem(what, "pass the total number, the same share of it for each machine", wrong_use=True)

    @property
    def is_needed(self) -> bool:
        """Whether this process has to start the training processes: several, or one with an explicit configuration."""
        return not is_launched() and (self.processes > 1 or self.is_asked)

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of the run, or starts it."""
        return self.machine_rank == 0 and os.environ.get("RANK", "0") == "0"

    @property
    def rendezvous(self) -> Rendezvous | None:
        """Where several machines wait for each other; None: there is one, or no address."""
        if self.machines == 1 or self.main_process_ip is None or self.main_process_port is None:
            return None
        return Rendezvous(
            address=self.main_process_ip,
            port=self.main_process_port,
            machines=self.machines,
            rank=self.machine_rank,
        )

    @property
    def words(self) -> list[str]:
        """Options of accelerate's launcher."""
        options = ["--num_processes", str(self.processes)]
        if self.config:
            options += ["--config_file", str(self.config)]
        else:  # what the launcher would use by default, with a warning; the plan decides the precision
            options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        options += ["--num_machines", str(self.machines), "--machine_rank", str(self.machine_rank)]
        # `--multi_gpu` means several processes of any kind; without it, the launcher silently starts one.
        options += ["--multi_gpu"] if self.distributed_type in STARTED_ALONE and self.processes > 1 else []
        if self.main_process_ip and self.machines > 1:
            options += ["--main_process_ip", self.main_process_ip]
        # a free port, so that runs on one machine do not collide
        port = self.main_process_port or (0 if self.machines == 1 else None)
        return options if port is None else [*options, "--main_process_port", str(port)]


def _without_machines(parameters: Parameters) -> Iterator[Problem]:
    """The problems of parameters that mean nothing with one machine."""
    for name in ("machine_rank", "main_process_ip"):
        if getattr(parameters, name):
            what = f"`{name}` is set, but one machine trains"
            yield Problem(what, "pass `--num_machines` too, or remove it", wrong_use=True)


def launch(flags: Mapping[str, Any], asked: Launch, device: str) -> int:
    """Run the same command in several processes, report how they ended, and return the exit code.

    Signals to this process are forwarded to the training processes, which save and end; the launcher itself would give
    them half a minute. A second signal ends them at once.

    Raises:
        DiffSynthError: if there are fewer GPUs than processes, or another machine cannot start.
    """
    import torch

    environment = dict(os.environ)
    here = asked.processes // asked.machines
    with errors_sent(asked.rendezvous):
        if device == "cpu":
            environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
        elif (there := torch.accelerator.device_count()) < here:
            raise DiffSynthError(
                f"{here} processes on this machine need as many GPUs, but {there} are available",
                f"request {there * asked.machines} in total",
            )
    if asked.rendezvous:
        where = f"{asked.main_process_ip}:{asked.main_process_port}"
        echo(f"Machine {asked.machine_rank} of {asked.machines} waits for the others at {where}", err=True)
        if not wait_for_machines(asked.rendezvous):
            echo("Nothing left to do: the run of machine 0 is complete", err=True)
            return 0
    command = [*LAUNCHER, *asked.words, "-m", "diffsynth_cli", "train", *as_words(flags)]
    with TemporaryDirectory(prefix="diffsynth-") as folder:
        reports = Path(folder)
        environment[REPORTS] = folder
        with (
            subprocess.Popen(command, env=environment, start_new_session=True) as launcher,
            _handing_on(launcher, reports) as stopped,
        ):
            code = launcher.wait()
            while ranks.alive(reports):  # the launcher was killed: the processes save and end by themselves
                time.sleep(0.2)
        if code == 0 and not stopped:
            return 0
        ending = ranks.read_endings(reports).get(ranks.LAUNCHER, Ending(code))
        if stopped:
            ending = replace(ending, code=SIGNAL_EXIT_BASE + stopped[0])
        elif code < 0:
            ending = ranks.killed("the process launcher", -code)
        ending.show()
        ranks.keep_in_log(ending, reports)
    return ending.code


def as_words(flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags by name, as words of a command line."""
    for name, value in flags.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no_{name}"
        else:
            yield from (f"--{name}", str(value))


@contextmanager
def _handing_on(launcher: "subprocess.Popen[bytes]", reports: Path) -> Iterator[Sequence[int]]:
    """While the block runs, forward stop signals to the launcher; yields the signals received."""
    came: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        came.append(number)
        if len(came) == 1:
            echo(FINISHING, err=True)
        processes = {process.pid: process for process in ranks.alive(reports)}
        with suppress(psutil.Error):
            processes |= {process.pid: process for process in psutil.Process(launcher.pid).children()}
        if not processes and launcher.poll() is None:  # not started yet
            launcher.send_signal(number)
        for process in processes.values():
            with suppress(psutil.Error):
                process.send_signal(number if len(came) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, hand_on) for number in STOPPING_SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_of_launcher() -> int | None:
    """Number of processes requested from `accelerate launch`, by its command line or configuration; None: unknown."""
    with suppress(psutil.Error):
        for parent in psutil.Process().parents()[:2]:
            words = parent.cmdline()
            if any(Path(word).name == "accelerate" or word in LAUNCHERS for word in words):
                return _asked(words)
    return None


def _asked(words: Sequence[str]) -> int | None:
    """The number of processes in a command line of `accelerate launch`, or in the configuration file it names."""
    own = list(words[: words.index("-m", 3)] if "-m" in words[3:] else words)
    own = [part for word in own for part in (word.split("=", 1) if word.startswith("--") else [word])]
    pairs = zip(own, [*own[1:], ""], strict=True)
    given = {name.replace("-", "_"): value for name, value in pairs if name.startswith("--")}
    number = given.get("__num_processes")
    if number:
        return int(number)
    named = given.get("__config_file")
    # With `--cpu`, the launcher reads no default configuration.
    config = Path(named) if named else None if "__cpu" in given else default_config()
    if config is None or not config.is_file():
        return None
    asked = read_yaml(config).get("num_processes")
    return int(asked) if asked else None
