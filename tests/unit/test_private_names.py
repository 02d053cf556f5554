"""Private names of other packages: the list of those in use, and a test that each still works as expected."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

ROOT = Path(__file__).parents[2]
MEASURE = "core/diffsynth_core/models/activation_memory.py"
USED = {
    (MEASURE, "_cdata"),
    (MEASURE, "_python_dispatch"),
    (MEASURE, "_pytree"),
    (MEASURE, "_set_gradient_checkpointing"),
    ("core/diffsynth_core/models/attention.py", "_attention_backend"),
    ("core/diffsynth_core/models/autocast.py", "_pytree"),
    ("core/diffsynth_core/models/checkpointing.py", "_pytree"),
    ("core/diffsynth_core/models/checkpointing.py", "_scaled_dot_product_cudnn_attention"),
    ("core/diffsynth_core/models/checkpointing.py", "_scaled_dot_product_efficient_attention"),
    ("core/diffsynth_core/models/checkpointing.py", "_scaled_dot_product_flash_attention"),
    ("core/diffsynth_core/models/checkpointing.py", "_scaled_dot_product_flash_attention_for_cpu"),
    ("core/diffsynth_core/training/activations.py", "_base"),
    ("core/diffsynth_core/training/context_parallel.py", "_cp_plan"),
    ("core/diffsynth_core/training/context_parallel.py", "_parallel_config"),
    ("core/diffsynth_core/training/engines/zero.py", "_get_norm_groups"),
    ("core/diffsynth_core/training/engines/zero.py", "_hp_optimizer_states_linked"),
    ("core/diffsynth_core/training/engines/zero.py", "_lazy_init_hp_params_optimizer_state"),
    ("core/diffsynth_core/training/setup.py", "_reset_state"),
    ("core/diffsynth_core/hub/client.py", "_Hash"),  # of typeshed, imported for the type checker alone
}
"""Each has a comment where it is used, and a test below, which fails first if a package changes it; for the measurement
of activations that is tests/unit/models/test_activation_memory.py, for attention tests/parity/test_attention.py, for
DeepSpeed tests/runs/test_zero.py, for context parallelism tests/runs/test_context_parallel.py."""
NOT_PRIVATE = {"_exit", "_replace"}
"""Documented by Python: `os._exit`, and `_replace` of named tuples."""


def private_names(path: Path) -> Iterator[str]:
    """The underscored names in a file that are defined neither in it nor in this project."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    known = {*NOT_PRIVATE, *(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))}
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            known.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            known.add(node.attr)
    for node in nodes:
        found: list[str] = []
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("diffsynth"):
            found = [*(node.module or "").split("."), *(name.name for name in node.names)]
        elif isinstance(node, ast.Import):
            found = [part for name in node.names for part in name.name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        yield from (name for name in found if name.startswith("_") and not name.startswith("__") and name not in known)


def test_no_other_private_name_is_used():
    sources = [*(ROOT / "core").rglob("*.py"), *(ROOT / "diffsynth_cli").rglob("*.py")]
    found = {(str(path.relative_to(ROOT)), name) for path in sources for name in private_names(path)}
    assert found == USED


@pytest.mark.parametrize(
    "line",
    [
        "typer.main._get(1)",
        "from torch import _C",
        "import rich._wrap",
        "from a._b import c",
        "getattr(module, '_hooks')",
        "module._hooks = {}",
    ],
)
def test_a_private_name_is_seen(tmp_path, line):
    (tmp_path / "module.py").write_text(f"{line}\n")
    assert list(private_names(tmp_path / "module.py"))


def test_accelerate_takes_another_precision_after_a_reset():
    try:
        for precision in ("bf16", "no"):
            AcceleratorState._reset_state()
            assert Accelerator(mixed_precision=precision, cpu=True).mixed_precision == precision
        with pytest.raises(ValueError, match="already been initialized"):  # else the reset could go
            Accelerator(mixed_precision="bf16", cpu=True)
    finally:
        AcceleratorState._reset_state()


def test_the_base_of_a_view_is_what_it_views():
    weight = nn.Parameter(torch.zeros(2, 3))
    assert weight.t()._base is weight
    assert weight.clone()._base is None
