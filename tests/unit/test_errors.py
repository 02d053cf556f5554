"""Problems, exit codes, suggestions, and the abbreviations of names and bytes in messages."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from diffsynth_core.errors import (
    DiffSynthError,
    FaultsFound,
    Interrupted,
    Problem,
    collect_problems,
    list_names,
    raise_if_any,
    report,
    report_missing,
    suggest,
)
from diffsynth_core.progress import format_bytes


def test_an_error_is_one_problem():
    error = DiffSynthError("message", "hint")
    assert error.problems == (Problem("message", "hint"),)
    assert (str(error), error.exit_code) == ("message", 1)


@pytest.mark.parametrize(("wrong_use", "exit_code"), [([False, False], 1), ([False, True], 2), ([True], 2)])
def test_faults_are_reported_together_and_once_each(wrong_use, exit_code):
    problems = [Problem(str(number), wrong_use=wrong) for number, wrong in enumerate(wrong_use)]
    with pytest.raises(FaultsFound) as caught:
        raise_if_any([*problems, problems[0]])
    assert caught.value.problems == tuple(problems)
    assert caught.value.exit_code == exit_code


def test_problems_are_collected_by_the_innermost_block():
    one, two, three = map(Problem, ("one", "two", "three"))
    with collect_problems() as outer:
        report(one)
        with collect_problems() as inner:
            report(two)
        report_missing(three)
    assert (outer, inner) == ([one, three], [two])


def test_what_is_missing_is_kept_apart_where_that_is_asked_for():
    wrong, absent = Problem("wrong"), Problem("absent")
    with collect_problems(missing_apart=True) as problems:
        report_missing(absent)
        report(wrong)
    assert (problems, problems.missing) == ([wrong], [absent])


def test_a_problem_that_nobody_collects_is_an_error():
    with collect_problems(), ThreadPoolExecutor() as pool, pytest.raises(LookupError):
        pool.submit(report, Problem("in a thread")).result()
    with pytest.raises(LookupError):
        report(Problem("outside"))


def test_no_faults_are_no_error():
    assert raise_if_any([]) is None


@pytest.mark.parametrize(("signal_number", "exit_code"), [(2, 130), (15, 143)])
def test_an_interrupted_run_exits_as_a_shell_expects(signal_number, exit_code):
    assert Interrupted(signal_number, "x").exit_code == exit_code


@pytest.mark.parametrize(
    ("name", "near"),
    [("lora_rnk", "lora_rank"), ("lora-rank", "lora_rank"), ("seeds", "seed"), ("zzz", None), ("", None)],
)
def test_the_nearest_name_is_suggested(name, near):
    assert suggest(name, ["lora_rank", "seed", "height"]) == near


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["a"], "`a`"),
        (list("abcde"), "`a`, `b`, `c`, `d`, `e`"),
        (list("abcdefg"), "`a`, `b`, `c`, `d`, `e` and 2 more"),
    ],
)
def test_long_lists_are_shortened(names, shown):
    assert list_names(names) == shown


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (40_860_802_176, "40.9 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_bytes_as_people_read_them(count, text):
    assert format_bytes(count) == text
