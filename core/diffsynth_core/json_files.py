"""Reading JSON that another program, a crash or a hand may have damaged: one reader, which names file and place.

`read_json` gives what a file holds as the type that is asked for, a dataclass for instance. `parse_json` and `as_type`
are its two halves, for text that stands elsewhere, such as in the header of a safetensors file. No torch.
"""

import dataclasses
import json
import math
import stat
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from diffsynth_core.errors import DiffSynthError, kind_of, list_names, truncate

T = TypeVar("T")

MAX_BYTES = 64 * 2**20
"""Largest JSON file that is read unless the caller knows better: 64 MiB; the largest indexes of shards have 200 kB."""
MAX_TOKENIZER_BYTES = 512 * 2**20
"""Largest file of a tokenizer: 512 MiB; the largest published ones have some 40 MB."""
MAX_DEPTH = 64
"""Brackets within brackets. Real files have fewer than 10, and whatever walks through a value may recurse."""
MAX_FLOAT = int(sys.float_info.max)
SHOWN_OF_A_VALUE = 40
"""Characters of a wrong value that a message shows."""
TYPE_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}
"""Scalar types of JSON, for messages."""


class InvalidJson(ValueError):
    """A text is not JSON, or JSON that is not read; `line` and `column` count from 1, None where no place is known."""

    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column


class WrongType(ValueError):
    """A value of JSON is of another type than expected; the text names its place, such as `checkpoints[0].bytes`."""


class UnreadableFile(DiffSynthError):
    """A file is missing, is not what its name promises, or does not hold what is expected of it."""


def read_json(path: Path, kind: type[T], hint: str, limit: int = MAX_BYTES, byte_order_mark: bool = True) -> T:
    """What a JSON file holds, as `kind`: see `as_type`.

    Args:
        hint: what to do about a file that cannot be read.
        limit: largest size in bytes.
        byte_order_mark: pass over one; False for files that a library reads afterwards which does not.

    Raises:
        UnreadableFile: names the file and the place in it: line and column, or the key path.
    """
    try:
        return as_type(parse_json(read_text(path, limit, hint, byte_order_mark)), kind)
    except InvalidJson as error:
        place = f"line {error.line}, column {error.column}: " if error.line else ""
        raise UnreadableFile(f"`{path}` is not valid JSON: {place}{error}", hint) from error
    except WrongType as error:
        raise UnreadableFile(f"`{path}`: {error}", hint) from error


def read_json_lines(path: Path, limit: int = MAX_BYTES) -> Iterator[dict[str, Any]]:
    """The objects in a file of one object a line that is a mere memory: what cannot be read is passed over.

    Of a file larger than `limit` bytes nothing is read.
    """
    try:
        text = _read_bytes(path, limit, "").decode("utf-8", errors="replace")
    except UnreadableFile:
        return
    for line in text.splitlines():
        try:
            value = parse_json(line)
        except InvalidJson:
            continue
        if isinstance(value, dict):
            yield value


def read_text(path: Path, limit: int, hint: str, byte_order_mark: bool = True) -> str:
    """The text of a file in UTF-8; see `read_json`.

    Raises:
        UnreadableFile: when it is missing, no regular file, too large or not UTF-8.
    """
    try:
        return _read_bytes(path, limit, hint).decode("utf-8-sig" if byte_order_mark else "utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"`{path}` is not UTF-8 (byte {error.start})", hint) from error


def _read_bytes(path: Path, limit: int, hint: str) -> bytes:
    """The bytes of a regular file: a pipe or a device in its place would block, or never end."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableFile(f"`{path}` is a folder, expected a file", hint)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(f"`{path}` is not a regular file", hint)
        if status.st_size > limit:
            raise UnreadableFile(f"`{path}` has {status.st_size} bytes, the limit is {limit}", hint)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableFile(f"`{path}` is missing", hint) from error
    except OSError as error:
        raise UnreadableFile(f"cannot read `{path}`: {error.strerror}", hint) from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableFile(f"cannot read `{path}`: {error}", hint) from error


def parse_json(text: str, finite: bool = True) -> Any:
    """What a JSON text holds.

    Args:
        finite: refuse NaN, Infinity and numbers beyond a 64-bit float, which JSON does not have. Tables that pandas
            exported have NaN in empty cells.

    Raises:
        InvalidJson: when it is not JSON, has a key twice in one object, is nested deeper than `MAX_DEPTH`, or has a
            number of thousands of digits.
    """
    strict: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_float} if finite else {}
    if text.startswith("\ufeff"):
        raise InvalidJson("it starts with a byte order mark", 1, 1)
    try:
        value = json.loads(text, object_pairs_hook=_each_once, **strict)
    except json.JSONDecodeError as error:
        what = error.msg if text.strip() else "it is empty"
        raise InvalidJson(what, error.lineno, error.colno) from error
    except InvalidJson:
        raise
    except RecursionError as error:
        raise InvalidJson("it is nested too deeply") from error
    except ValueError as error:  # what `int` says of too many digits
        raise InvalidJson("a number has too many digits") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise InvalidJson("it is nested too deeply")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. One with a key twice says two things, and programs differ in which of them they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJson(f"duplicate key `{truncate(twice)}` in an object")
    return content


def _refuse_constant(name: str) -> Any:
    raise InvalidJson(f"{name} is not a valid JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidJson(f"the number {truncate(digits)} is too large")
    return number


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit`; does not recurse itself."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def as_type(value: Any, kind: type[T], place: str = "") -> T:
    """A value of JSON as `kind`, with nothing converted but an integer where a float is expected.

    Args:
        kind: `str`, `int`, `float`, `bool`, `None`, `Any`, a literal, a union, `list[…]`, `tuple[…]`, `dict[str, …]`,
            or a dataclass of these: keys without a default must be there, and no others may.
        place: where the value stands, for messages: a key path such as `checkpoints[0]`.

    Raises:
        WrongType: names the key path, what is there and what is expected.
    """
    return typing.cast(T, _convert(value, kind, place))


def _convert(value: Any, kind: Any, place: str) -> Any:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return value
    if origin is Literal:
        known = [part for part in parts if type(part) is type(value) and part == value]
        return _expect(value, bool(known), " or ".join(map(json.dumps, parts)), place)
    if origin in (Union, types.UnionType):
        return _convert_to_one_of(value, parts, place)
    if dataclasses.is_dataclass(origin):
        return _convert_to_dataclass(value, origin, place)
    if origin in (list, tuple, Sequence):
        return _convert_to_sequence(_expect(value, isinstance(value, list), "a list", place), origin, parts, place)
    if origin in (dict, Mapping):
        _expect(value, isinstance(value, dict), "an object", place)
        inner = parts[1] if parts else Any
        return {name: _convert(part, inner, f"{place}.{name}" if place else name) for name, part in value.items()}
    if origin is float and type(value) is int:
        _expect(value, abs(value) < MAX_FLOAT, "a smaller number", place)
        return float(value)
    scalar = type(None) if origin is None else origin
    return _expect(value, type(value) is scalar, TYPE_NAMES[scalar], place)


def _convert_to_one_of(value: Any, kinds: Sequence[Any], place: str) -> Any:
    """The first of several types that fits; where none does, the last says why: None is usually named last but one."""
    *others, last = sorted(kinds, key=lambda kind: kind is not type(None))
    for kind in others:
        try:
            return _convert(value, kind, place)
        except WrongType:
            continue
    return _convert(value, last, place)


def _convert_to_dataclass(value: Any, kind: Any, place: str) -> Any:
    _expect(value, isinstance(value, dict), "an object", place)
    types_of = _field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = [name for name in value if name not in fields]
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is field.default_factory is dataclasses.MISSING
    ]
    where = f" in `{truncate(place)}`" if place else ""
    if missing:
        raise WrongType(f"{list_names(missing)} {'is' if len(missing) == 1 else 'are'} missing{where}")
    if unknown:
        raise WrongType(f"unknown {'key' if len(unknown) == 1 else 'keys'} {list_names(unknown)}{where}")
    below = f"{place}." if place else ""
    return kind(**{name: _convert(part, types_of[name], f"{below}{name}") for name, part in value.items()})


@lru_cache
def _field_types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert_to_sequence(value: list[Any], origin: Any, parts: Sequence[Any], place: str) -> Any:
    """A list, or a tuple of any length (`tuple[int, ...]`) or of a fixed one."""
    fixed = origin is tuple and parts and parts[-1] is not Ellipsis
    _expect(value, not fixed or len(value) == len(parts), f"a list of {len(parts)}", place)
    kinds = parts if fixed else [parts[0] if parts else Any] * len(value)
    converted = [_convert(part, kind, f"{place}[{i}]") for i, (part, kind) in enumerate(zip(value, kinds, strict=True))]
    return tuple(converted) if origin is tuple else converted


def _expect(value: Any, fits: bool, expected: str, place: str) -> Any:
    if fits:
        return value
    if isinstance(value, dict | list):
        there = kind_of(value)
    else:
        there = f"`{truncate(json.dumps(value, ensure_ascii=False), SHOWN_OF_A_VALUE)}`"
    where = f"`{truncate(place)}`" if place else "the top level"
    raise WrongType(f"{where} is {there}, expected {expected}")
