"""The plan: everything about a run that can be known before a weight is read.

Training carries it out, `--dry-run` prints it.
"""
