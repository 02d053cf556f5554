"""Reading YAML with limits, with YAML 1.2 numbers (`1e-4` is a float), and with duplicate keys as errors.

An untrusted file can be made expensive: aliases of aliases that expand to billions of nodes, nesting beyond Python's
recursion limit, an alias inside its own anchor. Each is rejected while parsing, before it costs anything.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from diffsynth_core.errors import DiffSynthError, kind_of, truncate

MAX_BYTES = 256 * 2**10
"""Maximum size of a YAML file: 256 KiB. A recipe has about 2 kB."""
MAX_NODES = 10_000
"""Maximum number of keys and values with aliases expanded; each `CHARACTERS_PER_NODE` of a string count as one more.

A recipe has about 100.
"""
CHARACTERS_PER_NODE = 100
"""Length of a string that counts as one node."""
MAX_DEPTH = 32
"""Maximum nesting of lists and mappings. No parameter nests deeper than 3."""
MAX_DIGITS = 40
"""Maximum number of digits of an integer: converting a string to an integer takes quadratic time."""


class _Loader(yaml.SafeLoader):
    """Safe loader with limits and the floats of YAML 1.2: plain PyYAML reads `1e-4` as a string."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Size of each finished node, with aliases expanded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose a node and its descendants, counting them; called for every node during parsing."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=mark)
        node = super().compose_node(parent, index)
        assert isinstance(node, yaml.nodes.Node)
        self._depth -= 1
        if node not in self._sizes and isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=f"`*{event.anchor}` contains itself", problem_mark=mark)
        if node not in self._sizes:
            below = len(node.value) // CHARACTERS_PER_NODE if isinstance(node, yaml.ScalarNode) else self._below(node)
            self._sizes[node] = 1 + below
        self._nodes += 1
        if max(self._sizes[node], self._nodes) > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"it has more than {MAX_NODES} keys and values", problem_mark=mark)
        return node

    def _below(self, node: yaml.Node) -> int:
        """Return the total size of the items of a list or mapping."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        return sum(self._sizes[part] for part in parts)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not a string", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key `{key_node.value}`", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        raise yaml.MarkedYAMLError(
            problem=f"`{truncate(node.value, MAX_DIGITS)}` has too many digits", problem_mark=node.start_mark
        )
    return int(node.value)


YAML_12 = {f"tag:yaml.org,2002:{name}" for name in ("float", "bool", "int", "timestamp")}
"""Tags whose YAML 1.1 patterns are replaced."""

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in YAML_12]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        DiffSynthError: if the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise DiffSynthError(f"`{path}` is larger than {MAX_BYTES} bytes", "pass a configuration file")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DiffSynthError(f"cannot read `{path}`: {error.strerror}", "correct the path") from error
    except UnicodeDecodeError as error:
        raise DiffSynthError(f"`{path}` is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    except ValueError as error:  # a NUL character in the path
        raise DiffSynthError(f"cannot read `{path}`: {error}", "correct the path") from error
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DiffSynthError(
            f"`{path}` is not valid YAML{line}: {error.problem or error.context}", "fix that line"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # Constructors of standard tags, such as `!!bool maybe`, raise whatever their parsers do.
        reason = " ".join(str(error).split())
        raise DiffSynthError(f"`{path}` is not valid YAML: {reason}", "fix the file") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DiffSynthError(
            f"`{path}` contains {kind_of(value)}, expected keys and values",
            "add `parameters:` with the values below it",
        )
    return value
