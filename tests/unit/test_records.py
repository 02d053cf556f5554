"""How records are built: by name where they have many fields, so that no call depends on the order of a dozen."""

import ast
from pathlib import Path

import diffsynth_cli
import diffsynth_core

TREES = {
    path: ast.parse(path.read_text())
    for package in (diffsynth_cli, diffsynth_core)
    for path in Path(package.__file__).parent.rglob("*.py")
}
MOST_POSITIONAL = 8


def test_no_record_is_built_with_many_positional_arguments():
    records = {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert {"RunPlan", "MediaHeader"} <= records
    calls = [
        (f"{path.name}:{node.lineno} {node.func.id}", len(node.args))
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in records
    ]
    assert max(count for _, count in calls) > 3, "calls are found"
    assert [(where, count) for where, count in calls if count > MOST_POSITIONAL] == []
