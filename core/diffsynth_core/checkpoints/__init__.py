"""Files of a run: checkpoints, the run record, metrics, and the state for resuming."""
