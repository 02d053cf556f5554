"""The command line of `diffsynth`: options, terminal, error boundary. The work is done by `diffsynth_core`."""

STOPPED = 130
"""The exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""
