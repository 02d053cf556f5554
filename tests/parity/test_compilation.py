"""Compiled blocks of every family, and of stored weights: whole graphs, with the gradients of plain ones."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffsynth_core.models.compilation import compile_blocks
from tests.parity.float8_runs import RECIPES, Step, plan_step

pytestmark = [  # PyTorch hides the first, if it may be shown, and the second is about its own code
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
CASES = [
    (family, method, False) for family, method in [*((family, None) for family in RECIPES), ("qwen-image", "int8")]
]
CASES += [("qwen-image", "fp8", False), *((family, None, True) for family in RECIPES)]


@pytest.mark.long
@pytest.mark.parametrize(("family", "method", "checkpointing"), CASES)
def test_gradients_are_those_of_plain_blocks(family, method, checkpointing, folder, monkeypatch):
    """`aot_eager` traces forward and backward pass as the compiler of users does, and computes each operation alike."""
    monkeypatch.chdir(folder)
    torch._dynamo.reset()
    components = ("dit",) if method else ()
    step = Step(plan_step(family, folder, components, method, use_gradient_checkpointing=checkpointing))
    expected = {name: gradient.clone() for name, gradient in step.gradients().items()}
    facts, counter = step.plan.model.facts, CompileCounterWithBackend("aot_eager")
    compile_blocks(facts.component(facts.denoiser), step.model.components[facts.denoiser], counter)
    for _ in range(2):
        step.model.zero_grad()
        found = step.gradients()
        # The first block, the last one, and those between; the second pass compiles nothing.
        assert 0 < counter.frame_count <= 3 * len(facts.component(facts.denoiser).blocks)
        assert found.keys() == expected.keys()
        assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-6
