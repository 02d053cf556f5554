"""`diffsynth`, and `python -m diffsynth_cli`: Ctrl-C while modules are imported is told as it is later."""

import os
import sys
from typing import NoReturn

from diffsynth_cli import REPORTS, STOPPED

ON_WINDOWS = """\
error: diffsynth does not run natively on Windows
  hint: run it in WSL2: `wsl --install`, then install diffsynth in the Linux system that it opens
"""


def run() -> int:
    """As `diffsynth_cli.main.main`, whose import is part of what can be stopped."""
    if sys.platform == "win32":  # before the engine is imported, which needs locks and signals that Windows lacks
        sys.stderr.write(ON_WINDOWS)
        return 1
    try:
        from diffsynth_cli.main import main
        from diffsynth_cli.streams import open_closed_descriptors

        open_closed_descriptors()
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted\n")  # typer may not be there yet
        return STOPPED


def end(code: int) -> NoReturn:
    """End a process of a run in several; what is left of a broken process group can wait for ever while Python ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = run()
    if code and REPORTS in os.environ:
        end(code)
    sys.exit(code)
