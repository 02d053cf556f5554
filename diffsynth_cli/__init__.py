"""The command line of `diffsynth`: options, terminal, error boundary. The work is done by `diffsynth_core`."""
