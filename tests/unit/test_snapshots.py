"""Snapshots hide what differs between runs, and nothing else."""

from tests.outcome import Outcome


def test_a_page_shows_the_exit_code_and_both_streams(says, tmp_path):
    says(Outcome(2, "data\n", f"error: cannot read `{tmp_path}/x`\n  hint: fix the path\n"))


def test_what_is_hidden_is_marked(says):
    says("trained 8 steps in 3.2 s", r"\d+\.\d s")
