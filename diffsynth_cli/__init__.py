"""The command line of `diffsynth`: options, terminal output and the error boundary. `diffsynth_core` does the work."""

STOPPED = 130
"""The exit code after Ctrl-C: 128 plus the signal number, as in shells."""
REPORTS = "DIFFSYNTH_RANK_REPORTS"
"""Environment variable that the launcher sets for the processes of a run: the folder for their exit reports."""
COMPLETION = "_DIFFSYNTH_COMPLETE"
"""Environment variable in which the scripts of `--show-completion` say what they ask for, such as `complete_bash`."""
COLLECTIONS = (100_000, 50, 1000)
"""Thresholds of Python's garbage collector (`gc.set_threshold`): imported modules are a million objects that stay, and
searching them as often as by default takes a fifth of the time to import them. Steps leave it no tensors
(tests/runs/test_garbage.py)."""
