"""Trackers that do not exist or are not installed."""

import sys

import pytest

from diffsynth_core.planning.output.trackers import TRACKERS
from tests.naming import names


@pytest.mark.parametrize("name", [name for name, package in TRACKERS.items() if package])
def test_a_missing_package_is_named_with_the_command_that_installs_it(refuse, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    code, problems = refuse("--log_with", f"csv,{name}", "--lora_rank", 0)
    install = f"pip install 'diffsynth-cli[{name}]'"
    assert code == 2 and [message for message, _ in problems][1:] == [names(name, "not installed")]
    assert problems[1][1] == names(install)


def test_a_tracker_that_does_not_exist(refuse):
    code, problems = refuse("--log_with", "tensorbord,comet")
    assert code == 2
    assert problems == [(names("tensorbord", *TRACKERS), names("`tensorboard`")), (names("comet"), None)]
