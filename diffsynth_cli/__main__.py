"""`python -m diffsynth_cli`."""

import sys

from diffsynth_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
