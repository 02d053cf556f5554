"""The command line of `diffsynth`: options, terminal, error boundary. The work is done by `diffsynth_core`."""

STOPPED = 130
"""The exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""
REPORTS = "DIFFSYNTH_RANK_REPORTS"
"""Environment variable that our launcher gives the processes of a run: the folder for how each of them ended."""
