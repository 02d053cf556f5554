"""Reading YAML as people write it: `1e-4` is a number, a repeated key is an error."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from diffsynth_core.errors import DiffSynthError, kind_of


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2's floats; plain PyYAML reads `1e-4` as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not a text", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key_node.value}` stands twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


YAML_12 = {f"tag:yaml.org,2002:{name}" for name in ("float", "bool", "int", "timestamp")}

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
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        DiffSynthError: when the file cannot be read, is not YAML, or holds something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DiffSynthError(f"cannot read `{path}`: {error.strerror}", "correct the path") from error
    except UnicodeDecodeError as error:
        raise DiffSynthError(f"`{path}` is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DiffSynthError(
            f"`{path}` is not YAML{line}: {error.problem or error.context}", "mend that line"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DiffSynthError(f"`{path}` is not YAML: {reason}", "mend the file") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DiffSynthError(
            f"`{path}` holds {kind_of(value)}, expected keys and values",
            "write `parameters:` and the values below it",
        )
    return value
