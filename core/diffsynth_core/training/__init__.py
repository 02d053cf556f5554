"""Carrying out a plan: encoding, the one training loop, checkpoints, the rehearsal."""
