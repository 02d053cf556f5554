"""What an engine takes over: where the parts of a module are when training begins."""

from types import SimpleNamespace

import torch
from torch import nn

from diffsynth_core.optimizers.per_parameter import PerParameterOptimizer
from diffsynth_core.training.engines.fused import FusedEngine
from diffsynth_core.training.trained_swap import TrainedSwap

DEVICE = torch.device("meta")
"""Stands for an accelerator: another device than that of the module."""


class Module(nn.Module):
    """Blocks of which one waits, and constants, as a training module is built."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.register_buffer("sigmas", torch.linspace(1, 0, 3), persistent=False)
        self.trained_swap = TrainedSwap([self.blocks[0]], torch.device("cpu"))

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def test_constants_are_on_the_device_and_parameters_stay():
    prepared = {}

    def prepare_model(module: nn.Module, **options: object) -> nn.Module:
        prepared.update(options)
        return module

    def make(parameters: dict[str, nn.Parameter]) -> PerParameterOptimizer:
        return PerParameterOptimizer(lambda some: torch.optim.SGD(some.values(), 0.1), parameters, DEVICE)

    engine, module = FusedEngine(SimpleNamespace(device=DEVICE, prepare_model=prepare_model), None), Module()
    engine.prepare(module, make)
    assert {name: value.device.type for name, value in [*module.named_parameters(), *module.named_buffers()]} == {
        "blocks.0.weight": "cpu",
        "blocks.0.bias": "cpu",
        "blocks.1.weight": "cpu",
        "blocks.1.bias": "cpu",
        "sigmas": "meta",
    }
    # accelerate would wrap the process of a launcher in DDP, which keeps all gradients.
    assert prepared == {"device_placement": False, "evaluation_mode": True}
