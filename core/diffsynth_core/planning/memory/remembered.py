"""Results of pure functions of a plan, remembered as long as the plan lives: a search for what fits asks often."""

import weakref
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
BY_VALUE = (str, int, frozenset, type(None))
"""Arguments that are told by their value; all others are records of a plan, which do not change, nor hash quickly."""


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Have a pure function compute each result once; whoever calls it does not change what it returns."""
    results: dict[tuple[Hashable, ...], R] = {}

    @wraps(function)
    def remembering(*arguments: P.args, **more: P.kwargs) -> R:
        assert not more, "arguments are told by their position"
        key = tuple(argument if isinstance(argument, BY_VALUE) else id(argument) for argument in arguments)
        if key not in results:
            results[key] = function(*arguments, **more)
            for argument in arguments:
                if not isinstance(argument, BY_VALUE):
                    _forget_with(argument, results, key)
        return results[key]

    return remembering


def _forget_with(argument: Any, results: dict[Any, Any], key: tuple[Hashable, ...]) -> None:
    """Forget a result when an argument is freed: another object may get its id."""
    weakref.finalize(argument, results.pop, key, None).atexit = False
