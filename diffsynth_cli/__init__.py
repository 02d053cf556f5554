"""The command line of `diffsynth`: options, terminal output and the error boundary. `diffsynth_core` does the work."""

STOPPED = 130
"""The exit code after Ctrl-C: 128 plus the signal number, as in shells."""
REPORTS = "DIFFSYNTH_RANK_REPORTS"
"""Environment variable that the launcher sets for the processes of a run: the folder for their exit reports."""
COMPLETION = "_DIFFSYNTH_COMPLETE"
"""Environment variable in which the scripts of `--show-completion` say what they ask for, such as `complete_bash`."""
