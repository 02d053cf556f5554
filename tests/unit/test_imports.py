"""What modules import: no circles, whether at the top or inside functions; weight files know no model."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import diffsynth_cli
import diffsynth_core
from diffsynth_core.models.registry import FAMILIES

PACKAGES = [Path(package.__file__).parent for package in (diffsynth_cli, diffsynth_core)]
MODULES = {
    ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in package.rglob("*.py")
}


def imported(node: ast.AST) -> Iterator[str]:
    """Return the modules that a module imports, apart from imports for type checkers."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in MODULES else node.module
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        name: {*imported(ast.parse(path.read_text()))} & (MODULES.keys() - {name}) for name, path in MODULES.items()
    }
    assert graph["diffsynth_core.weights.headers"], "imports are found"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from error


def test_weight_files_name_no_family():
    names = {*FAMILIES, *(facts.title for facts in FAMILIES.values()), "qwen_image"}
    families = re.compile(rf"\b(?:{'|'.join(names)})\b", re.IGNORECASE)
    found = {name: families.findall(path.read_text()) for name, path in MODULES.items() if ".weights." in name}
    assert len(found) > 10 and not any(found.values()), found
