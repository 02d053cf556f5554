"""Components that are dropped are gone, whether they hold each other or not, and only then is everything searched."""

import gc
import weakref

import pytest
import torch
from torch import nn

from diffsynth_core.planning.model import loading

CPU = torch.device("cpu")


@pytest.fixture
def searches(monkeypatch) -> list[int]:
    """One entry for each time that all objects are searched for cycles."""
    found = []
    collect = gc.collect
    monkeypatch.setattr(loading.gc, "collect", lambda: found.append(collect()))
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize("in_cycle", [False, True])
def test_a_dropped_component_is_gone(in_cycle, searches):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("rows", torch.ones(2))
    if in_cycle:
        model[0].of = [model[0]]  # as a layer that a hook of its own refers to
    weight, rows = weakref.ref(model[0].weight), weakref.ref(model[0].rows)
    components = {"vae": model, "tokenizer": "no module"}
    del model
    loading.drop(components, CPU)
    assert components == {}
    assert weight() is None and rows() is None
    assert len(searches) == in_cycle
