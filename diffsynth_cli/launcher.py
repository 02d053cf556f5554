"""accelerate's launcher as a program of its own: `python -m diffsynth_cli.launcher OPTIONS -m diffsynth_cli train …`.

It ends its processes if the command that started it is gone, and reports how they ended in one sentence instead of the
tracebacks of accelerate and torch.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from diffsynth_cli import REPORTS
from diffsynth_cli.__main__ import end
from diffsynth_cli.errors import Ending, ending_of
from diffsynth_cli.ranks import LAUNCHER, join_endings, keep_in_log, write_ending
from diffsynth_cli.streams import guarded_streams, open_closed_descriptors
from diffsynth_core.processes import watch_parent


def main(words: Sequence[str]) -> int:
    """Launch and return the exit code of the run. How it ended is left for the command that started this one."""
    outer, reports = os.getppid(), Path(os.environ[REPORTS])
    watch_parent(outer, _stop_processes)
    logging.disable(logging.ERROR)  # torch logs failed processes, and how it ends the others
    ending = _launch(words, reports)
    if ending is None:
        return 0
    if os.getppid() == outer:
        write_ending(reports / f"{LAUNCHER}.json", ending)
    else:  # nobody else is left to report it, or to clean up
        ending.show()
        keep_in_log(ending, reports)
        shutil.rmtree(reports, ignore_errors=True)
    return ending.code


def _launch(words: Sequence[str], reports: Path) -> Ending | None:
    """How the processes ended; None if they succeeded."""
    # The functions of `accelerate launch` are not a documented interface; `tests/runs/test_processes.py` runs them.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(words)
    codes: Mapping[int, int] = {}
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:  # a single process, which accelerate starts in another way
        codes = {0: error.returncode}
    except SignalException:
        pass  # the processes were stopped, and have reported it
    except Exception as error:
        return ending_of(error)
    else:
        return None
    return join_endings(codes, reports, int(arguments.num_processes or 1))


def _stop_processes() -> None:
    """Let the processes save and end, as after a signal of the user; torch's launcher itself would give them half a
    minute."""
    with suppress(psutil.Error):
        if not (processes := psutil.Process().children()):
            os.kill(os.getpid(), signal.SIGTERM)
        for process in processes:
            process.terminate()


if __name__ == "__main__":
    open_closed_descriptors()
    with guarded_streams():
        end(main(sys.argv[1:]))
