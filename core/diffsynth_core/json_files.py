"""Strict reading of JSON files that a crash or another program may have damaged.

`read_json` returns the content of a file as a given type, such as a dataclass. `parse_json` and `as_type` are its two
steps, for text from elsewhere, such as the header of a safetensors file. No torch.
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
"""Maximum size of a JSON file unless the caller passes another: 64 MiB. The largest shard indexes have 200 kB."""
MAX_TOKENIZER_BYTES = 512 * 2**20
"""Maximum size of a tokenizer file: 512 MiB. The largest published ones have about 40 MB."""
MAX_DEPTH = 64
"""Maximum nesting. Real files have fewer than 10 levels, and code that walks a value may recurse."""
MAX_FLOAT = int(sys.float_info.max)
"""Largest integer that is converted to a float."""
SHOWN_OF_A_VALUE = 40
"""Maximum number of characters of a wrong value in a message."""
TYPE_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}
"""Scalar types of JSON in messages."""


class InvalidJson(ValueError):
    """A text is not valid JSON; `line` and `column` count from 1, and are None if the position is unknown."""

    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column


class WrongType(ValueError):
    """A JSON value has an unexpected type; the message names its key path, such as `checkpoints[0].bytes`."""


class UnreadableFile(DiffSynthError):
    """A file is missing, cannot be read, or does not contain what is expected."""


def read_json(path: Path, kind: type[T], hint: str, limit: int = MAX_BYTES, byte_order_mark: bool = True) -> T:
    """Read a JSON file and return its content as `kind` (see `as_type`).

    Args:
        hint: what to do about a file that cannot be read.
        limit: maximum size in bytes.
        byte_order_mark: accept a byte order mark; False for files that a library without support for it reads later.

    Raises:
        UnreadableFile: names the file and the position in it: line and column, or the key path.
    """
    try:
        return as_type(parse_json(read_text(path, limit, hint, byte_order_mark)), kind)
    except InvalidJson as error:
        position = f"line {error.line}, column {error.column}: " if error.line else ""
        raise UnreadableFile(f"`{path}` is not valid JSON: {position}{error}", hint) from error
    except WrongType as error:
        raise UnreadableFile(f"`{path}`: {error}", hint) from error


def read_json_lines(path: Path, limit: int = MAX_BYTES) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file that serves as a cache: unreadable lines are skipped.

    A file larger than `limit` bytes is not read at all.
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
    """Return the text of a UTF-8 file; see `read_json` for the arguments.

    Raises:
        UnreadableFile: if it is missing, not a regular file, too large or not UTF-8.
    """
    try:
        return _read_bytes(path, limit, hint).decode("utf-8-sig" if byte_order_mark else "utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"`{path}` is not UTF-8 (byte {error.start})", hint) from error


def _read_bytes(path: Path, limit: int, hint: str) -> bytes:
    """Return the bytes of a regular file: reading a pipe or a device could block, or never end."""
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
    """Parse a JSON text.

    Args:
        finite: reject NaN, Infinity and numbers beyond the range of a 64-bit float, which JSON does not have. Tables
            exported by pandas contain NaN for empty cells.

    Raises:
        InvalidJson: if the text is not JSON, has a duplicate key, is nested deeper than `MAX_DEPTH`, or has a number
            of thousands of digits.
    """
    strict: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_float} if finite else {}
    if text.startswith("\ufeff"):
        raise InvalidJson("it starts with a byte order mark", 1, 1)
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicate_keys, **strict)
    except json.JSONDecodeError as error:
        what = error.msg if text.strip() else "it is empty"
        raise InvalidJson(what, error.lineno, error.colno) from error
    except InvalidJson:
        raise
    except RecursionError as error:
        raise InvalidJson("it is nested too deeply") from error
    except ValueError as error:  # raised by `int` for too many digits
        raise InvalidJson("a number has too many digits") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise InvalidJson("it is nested too deeply")
    return value


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of unique keys: programs differ in which of two equal keys they use."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJson(f"duplicate key `{truncate(duplicate)}` in an object")
    return content


def _refuse_constant(name: str) -> Any:
    raise InvalidJson(f"{name} is not a valid JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidJson(f"the number {truncate(digits)} is too large")
    return number


def _is_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested deeper than `limit`; not recursive itself."""
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


def as_type(value: Any, kind: type[T], key_path: str = "") -> T:
    """Check that a JSON value has the type `kind`, and return it as that type.

    Nothing is converted, apart from lists to tuples, objects to dataclasses, and an integer where a float is expected.

    Args:
        kind: `str`, `int`, `float`, `bool`, `None`, `Any`, a literal, a union, `list[…]`, `tuple[…]`, `dict[str, …]`,
            or a dataclass of these, whose fields without a default are required and which allows no other keys.
        key_path: path of the value in its file for messages, such as `checkpoints[0]`.

    Raises:
        WrongType: names the key path, the value found and the type expected.
    """
    return typing.cast(T, _convert(value, kind, key_path))


def _convert(value: Any, kind: Any, key_path: str) -> Any:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return value
    if origin is Literal:
        known = [part for part in parts if type(part) is type(value) and part == value]
        return _expect(value, bool(known), " or ".join(map(json.dumps, parts)), key_path)
    if origin in (Union, types.UnionType):
        return _convert_to_one_of(value, parts, key_path)
    if dataclasses.is_dataclass(origin):
        return _convert_to_dataclass(value, origin, key_path)
    if origin in (list, tuple, Sequence):
        return _convert_to_sequence(
            _expect(value, isinstance(value, list), "a list", key_path), origin, parts, key_path
        )
    if origin in (dict, Mapping):
        _expect(value, isinstance(value, dict), "an object", key_path)
        inner = parts[1] if parts else Any
        return {name: _convert(part, inner, f"{key_path}.{name}" if key_path else name) for name, part in value.items()}
    if origin is float and type(value) is int:
        _expect(value, abs(value) < MAX_FLOAT, "a smaller number", key_path)
        return float(value)
    scalar = type(None) if origin is None else origin
    return _expect(value, type(value) is scalar, TYPE_NAMES[scalar], key_path)


def _convert_to_one_of(value: Any, kinds: Sequence[Any], key_path: str) -> Any:
    """Return the value as the first type of a union that fits; if none does, the error is that of the last."""
    *others, last = sorted(kinds, key=lambda kind: kind is not type(None))
    for kind in others:
        try:
            return _convert(value, kind, key_path)
        except WrongType:
            continue
    return _convert(value, last, key_path)


def _convert_to_dataclass(value: Any, kind: Any, key_path: str) -> Any:
    _expect(value, isinstance(value, dict), "an object", key_path)
    types_of = _field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = [name for name in value if name not in fields]
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is field.default_factory is dataclasses.MISSING
    ]
    where = f" in `{truncate(key_path)}`" if key_path else ""
    if missing:
        raise WrongType(f"{list_names(missing)} {'is' if len(missing) == 1 else 'are'} missing{where}")
    if unknown:
        raise WrongType(f"unknown {'key' if len(unknown) == 1 else 'keys'} {list_names(unknown)}{where}")
    below = f"{key_path}." if key_path else ""
    return kind(**{name: _convert(part, types_of[name], f"{below}{name}") for name, part in value.items()})


@lru_cache
def _field_types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert_to_sequence(value: list[Any], origin: Any, parts: Sequence[Any], key_path: str) -> Any:
    """Convert to a list, or to a tuple of any length (`tuple[int, ...]`) or of a fixed one."""
    fixed = origin is tuple and parts and parts[-1] is not Ellipsis
    _expect(value, not fixed or len(value) == len(parts), f"a list of {len(parts)}", key_path)
    kinds = parts if fixed else [parts[0] if parts else Any] * len(value)
    converted = [
        _convert(part, kind, f"{key_path}[{i}]") for i, (part, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(converted) if origin is tuple else converted


def _expect(value: Any, fits: bool, expected: str, key_path: str) -> Any:
    if fits:
        return value
    if isinstance(value, dict | list):
        there = kind_of(value)
    else:
        there = f"`{truncate(json.dumps(value, ensure_ascii=False), SHOWN_OF_A_VALUE)}`"
    where = f"`{truncate(key_path)}`" if key_path else "the top level"
    raise WrongType(f"{where} is {there}, expected {expected}")
