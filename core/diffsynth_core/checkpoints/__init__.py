"""What a run writes: checkpoints, the record of the run, metrics, and the state that resume needs."""
