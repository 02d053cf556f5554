"""Measured activations, remembered on disk from one command to the next. No torch."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, TypeVar

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import default_cache_path, write_text
from diffsynth_core.json_files import WrongType, as_type, read_json

T = TypeVar("T")
FILE = "activation_memory.json"
VERSION = 1
"""Goes up when what is measured, or how, changes."""
MAX_BYTES = 16 * 2**20
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class StepActivations:
    """Bytes of one forward pass, weights apart, each storage once.

    `stored`: what autograd keeps. `checkpointed`: the same where blocks are recomputed: what blocks get, and what is
    kept outside of them. `largest_block`: what a block keeps beside that while it is recomputed, at most;
    `block_inputs`: what it gets. `autocast_weights`: copies of the weights of blocks in the dtype of autocast.
    """

    stored: int
    checkpointed: int
    largest_block: int
    block_inputs: int
    autocast_weights: int


def remembered(question: Mapping[str, Any], kind: type[T], measure: Callable[[], T]) -> T:
    """What was measured for a question once, else what `measure` says now.

    Args:
        question: all that the answer depends on but the versions of the libraries, as JSON takes it.
        kind: the type of the answer, int or a dataclass.
    """
    key = _key(question)
    answer = _known().get(key)
    if answer is not None:
        with suppress(WrongType):
            return as_type(answer, kind)
    result = measure()
    _remember(key, result if isinstance(result, int) else asdict(result))  # type: ignore[call-overload]
    return result


def _key(question: Mapping[str, Any]) -> str:
    text = json.dumps([VERSION, _versions(), question], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _known() -> dict[str, Any]:
    """All that is remembered; nothing where the file is missing or was damaged."""
    try:
        return read_json(default_cache_path() / FILE, dict[str, Any], "", MAX_BYTES)
    except DiffSynthError:
        return {}


def _remember(key: str, answer: Any) -> None:
    """Add an answer to the file. Another process may do so at the same time: one of both answers is measured again."""
    with suppress(OSError, DiffSynthError):
        path = default_cache_path() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_known() | {key: answer}))
