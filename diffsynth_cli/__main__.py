"""`diffsynth`, and `python -m diffsynth_cli`: handles Ctrl-C also while modules are being imported."""

import gc
import os
import sys
from typing import NoReturn

from diffsynth_cli import COLLECTIONS, COMPLETION, REPORTS, STOPPED

ON_WINDOWS = """\
error: diffsynth does not run natively on Windows
  hint: run it in WSL2: `wsl --install`, then install diffsynth in the Linux system that it opens
"""
"""Message on Windows, which is not supported."""


def run() -> int:
    """Run `diffsynth_cli.main.main`; its import can be interrupted too."""
    if sys.platform == "win32":  # before the engine is imported, which needs locks and signals that Windows lacks
        sys.stderr.write(ON_WINDOWS)
        return 1
    gc.set_threshold(*COLLECTIONS)
    try:
        if COMPLETION in os.environ:
            from diffsynth_cli.completion import complete

            code = complete()
            if code is not None:
                return code
        from diffsynth_cli.main import main
        from diffsynth_cli.streams import open_closed_descriptors

        open_closed_descriptors()
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted\n")  # typer may not be imported yet
        return STOPPED


def end(code: int) -> NoReturn:
    """End a process of a run with several; a broken process group can block the interpreter's shutdown forever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = run()
    if code and REPORTS in os.environ:
        end(code)
    sys.exit(code)
