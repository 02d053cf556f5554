"""Safetensors files with headers damaged at random from a seed."""

import json
import random
from collections.abc import Callable
from typing import Any

ODD_NUMBERS = (
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    2**64,
    10**30,
    0.5,
    1e308,
    True,
    None,
    "8",
    [],
    {},
    float("inf"),
    float("nan"),
)
ODD_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "pipe.",
    "pipe.dit.",
    "pipe.../x.y",
    "\ud800",
    "\0",
    "é",
    "x" * 5000,
    "__metadata__",
)
DTYPES = ("F32", "BF16", "I8", "F4", "", "f32", 7, None, [], "BOOL")


def _bytes(header: bytes, drawn: random.Random) -> bytes:
    """Change some bytes of the header."""
    changed = bytearray(header)
    for _ in range(drawn.choice((1, 1, 2, 8))):
        changed[drawn.randrange(len(changed))] = drawn.randrange(256)
    return bytes(changed)


def _structure(header: bytes, drawn: random.Random) -> bytes:
    """Change one value in the JSON."""
    content: dict[str, Any] = json.loads(header)
    name = drawn.choice([key for key in content if key != "__metadata__"])
    entry = content[name]
    side = drawn.choice(("dtype", "shape", "data_offsets", "name", "metadata", "lacks", "surplus", "all"))
    if side == "dtype":
        entry["dtype"] = drawn.choice(DTYPES)
    elif side in ("shape", "data_offsets"):
        entry[side] = [drawn.choice((number, *ODD_NUMBERS)) for number in entry[side]] or [drawn.choice(ODD_NUMBERS)]
    elif side == "name":
        content[drawn.choice(ODD_NAMES)] = content.pop(name)
    elif side == "metadata":
        content["__metadata__"] = drawn.choice((None, [], {"a": 1}, {"removed_prefix": "\ud800"}, {"family": "x"}, "x"))
    elif side == "lacks":
        del entry[drawn.choice(list(entry))]
    elif side == "surplus":
        content[f"{name}.more"] = entry
    else:
        content[name] = drawn.choice((None, 3, "x", [], {}, [entry]))
    return json.dumps(content).encode()


def _twice(header: bytes, drawn: random.Random) -> bytes:
    """Duplicate a name."""
    content = json.loads(header)
    name = drawn.choice(list(content))
    return header[:-1].rstrip(b" }") + b"}," + json.dumps({name: content[name]}).encode()[1:]


def _deep(header: bytes, drawn: random.Random) -> bytes:
    """Add nesting that is too deep, or a number that is too long."""
    return drawn.choice((b"[" * 100_000, b'{"x":' * 50_000, b'{"x":' + b"9" * 5000 + b"}"))


KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _bytes,
    _bytes,
    _structure,
    _structure,
    _structure,
    _twice,
)


def corrupt(whole: bytes, seed: int) -> bytes:
    """Return the bytes of a safetensors file with a damaged, truncated or wrong header."""
    drawn = random.Random(seed)
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    way = drawn.randrange(10)
    if way == 0:
        return whole[: drawn.randrange(len(whole))]
    if way == 1:
        said = drawn.choice((0, 1, length - 1, length + 1, len(whole), 2**40, 2**63, 2**64 - 1))
        return said.to_bytes(8, "little") + whole[8:]
    if way == 2:
        return whole + bytes(drawn.randrange(1, 100))
    header = _deep(header, drawn) if way == 3 and not drawn.randrange(4) else drawn.choice(KINDS)(header, drawn)
    return len(header).to_bytes(8, "little") + header + data
