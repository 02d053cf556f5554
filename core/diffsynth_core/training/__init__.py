"""Carrying out a plan: encoding, the one training loop, what follows it, checkpoints, two-stage training."""
