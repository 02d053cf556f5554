"""Host memory stays pinned as long as anything uses it."""

import gc
from types import SimpleNamespace

import pytest
import torch

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.host_memory import allocate, pin


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of CUDA pins memory; `registered` are the addresses that are pinned."""
    registered: dict[int, int] = {}
    runtime = SimpleNamespace(
        registered=registered,
        error=0,
        cudaHostRegister=lambda address, size, flags: registered.update({address: size}) or runtime.error,
        cudaHostUnregister=registered.pop,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_a_view_keeps_its_memory_pinned(runtime):
    view = pin(allocate(4096), torch.device("cuda"))[:64].view(torch.float32).view(4, 4)
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    weight.data = view
    del view
    gc.collect()
    assert runtime.registered == {weight.data_ptr(): 4096}
    weight.data = torch.zeros(4, 4)
    gc.collect()
    assert runtime.registered == {}


def test_memory_that_cannot_be_pinned_is_an_error(runtime):
    runtime.error = 2
    with pytest.raises(DiffSynthError) as caught:
        pin(allocate(4096), torch.device("cuda"))
    [problem] = caught.value.problems
    assert "4.0 KiB more of host memory be pinned (CUDA error 2)" in problem.message
