"""`diffsynth`, and `python -m diffsynth_cli`: Ctrl-C while modules are imported is told as it is later."""

import sys

from diffsynth_cli import STOPPED


def run() -> int:
    """As `diffsynth_cli.main.main`, whose import is part of what can be stopped."""
    try:
        from diffsynth_cli.main import main
        from diffsynth_cli.streams import open_closed_descriptors

        open_closed_descriptors()
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted\n")  # typer may not be there yet
        return STOPPED


if __name__ == "__main__":
    sys.exit(run())
