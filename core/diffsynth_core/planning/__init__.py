"""The plan: everything about a run that can be known before a weight is read.

Training carries it out, `--dry_run` prints it. There is a folder for each of its records (`model`, `data`, `training`,
`output`, `machine`), for what is drawn, and for estimates.
"""
