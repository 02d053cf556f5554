"""Steps leave no tensors that only a garbage collection would free, so that collections may be rare."""

import gc
from collections.abc import Iterator

import pytest
import torch

from diffsynth_core.training import loop

PREVIEWS = ("--preview_prompts", "dataset", "--preview_every", 1, "--preview_steps", 2)


@pytest.fixture
def tensors_left(monkeypatch) -> Iterator[list[torch.Tensor]]:
    """The tensors that a collection finds which is the first since the second step, after the fourth."""
    update = loop.Run._update
    found: list[torch.Tensor] = []
    steps: list[object] = []

    def counted(*arguments: object) -> None:
        update(*arguments)
        steps.append(arguments)
        if len(steps) == 2:
            while gc.collect():  # what one collection frees may leave something for the next
                pass
            gc.disable()
        elif len(steps) == 4:
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(0)
            # By type: tensors without values, of what other tests have compiled, are of another one.
            found.extend(each for each in gc.garbage if type(each) in (torch.Tensor, torch.nn.Parameter))
            gc.garbage.clear()
            gc.enable()

    monkeypatch.setattr(loop.Run, "_update", counted)
    yield found
    gc.enable()
    assert len(steps) >= 4


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("qwen-image-lora", ("--use_gradient_checkpointing", "--checkpointing", "nested")),
        ("qwen-image-full", ("--fused_backward",)),
        ("qwen-image-lora", ("--validation_split", "0.25", "--validate_every", 1, *PREVIEWS)),
    ],
)
def test_a_step_leaves_no_tensors_to_collect(tensors_left, train_into, recipe, flags):
    train_into("run", "--recipe", recipe, "--max_steps", 4, *flags)
    assert tensors_left == []
