"""What waits in host memory for the backward pass: activations, and no weights."""

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from diffsynth_core.training.activations import OffloadActivations, is_weight


def saved_by(module: nn.Module, value: torch.Tensor, recompute: bool = False) -> list[torch.Tensor]:
    """The tensors that the backward pass of a module keeps."""
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        (checkpoint(module, value, use_reentrant=False) if recompute else module(value)).sum().backward()
    return saved


def test_the_weight_of_a_linear_layer_is_told_from_its_input():
    layer, value = nn.Linear(3, 5), torch.randn(2, 3, requires_grad=True)
    saved = saved_by(layer, value)
    assert {tuple(tensor.shape) for tensor in saved if is_weight(tensor)} <= {(5, 3), (3, 5)}
    assert [tuple(tensor.shape) for tensor in saved if not is_weight(tensor)] == [(2, 3)]
    assert any(is_weight(tensor) for tensor in saved)


def test_of_a_recomputed_block_only_its_input_waits():
    block, value = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)), torch.randn(2, 3, requires_grad=True)
    waiting = [tensor for tensor in saved_by(block, value, recompute=True) if not is_weight(tensor)]
    assert [tuple(tensor.shape) for tensor in waiting] == [(2, 3)]
    assert torch.equal(waiting[0], value)


def test_gradients_are_those_of_a_plain_run():
    block, value = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)), torch.randn(2, 3)
    block(value).sum().backward()
    plain = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    with OffloadActivations():
        loss = checkpoint(block, value, use_reentrant=False).sum()
    loss.backward()
    assert all(torch.equal(parameter.grad, one) for parameter, one in zip(block.parameters(), plain, strict=True))
