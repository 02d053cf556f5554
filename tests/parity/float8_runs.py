"""One training step of every family on tiny weights, with components in 8-bit floats, or rounded to their values."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffsynth_core.adapters.lora import lora_layers
from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.loading import build_empty, stored_layers
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.weight_store import STORES
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.rehearsal.preparation import prepare
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.loader import iterate_micro_batches
from diffsynth_core.training.model import TrainingModule, build_training_module
from diffsynth_core.training.setup import make_accelerator

RECIPES = {
    "qwen-image": "qwen-image-lora",
    "wan": "wan2.1-t2v-1.3b-lora",
    "flux": "flux.1-dev-lora",
    "flux2": "flux.2-klein-4b-lora",
}


def plan_step(
    name: str, folder: Path, components: tuple[str, ...] = (), method: str | None = None, **parameters: object
) -> RunPlan:
    """Plan the rehearsal of a recipe with some components quantized by a method; None: cast to 8-bit floats."""
    given = {"recipe": RECIPES.get(name, name), "device": "cpu", "cache_path": str(folder / "cache"), "max_steps": 1}
    given |= {"output_path": str(folder / "out"), "dataset_num_workers": 0, **parameters}
    reporter = SilentReporter()
    plain, base = prepare(resolve(given), reporter)
    origins = {name: files.origin for name, files in make_plan(plain, reporter, base=base).model.components.items()}
    entries = [origins[name] for name in components]
    chosen = {"quant_options": dict.fromkeys(entries, method)} if method else {"fp8_models": entries}
    return make_plan(prepare(resolve(given | chosen), reporter)[0], reporter, base=base)


class Step:
    """A model on its first micro-batch."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        reporter, family = SilentReporter(), load_family(plan.model.facts.name)
        plan = with_encodings(plan, reporter)
        self.accelerator = make_accelerator(plan)
        fill_cache(plan, family, self.accelerator, reporter, StopRequest())
        self.model = build_training_module(plan, family, torch.device("cpu"), reporter)
        self.micro_batch = next(iterate_micro_batches(plan, 0))
        _settle(self.model)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of all trained parameters."""
        with self.accelerator.autocast():
            losses = self.model(self.micro_batch)
        losses.sum().backward()
        return {name: parameter.grad for name, parameter in self.model.trained().items()}


def _settle(model: TrainingModule) -> None:
    """Randomize lora_B, which is zero at the start and gives lora_A no gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            up = layer.lora_B["default"].weight
            up.copy_(torch.randn(up.shape, generator=generator) * 0.05)


def round_weights(plan: RunPlan, component: str, module: nn.Module) -> int:
    """Round in place the weights that would be stored in 8-bit floats; return their number."""
    family, files = load_family(plan.model.facts.name), plan.model.components[component]
    narrow = stored_layers(family.facts.component(component), build_empty(family, files), STORES["float8"])
    parameters = {name.replace(".base_layer.", "."): value for name, value in module.named_parameters()}
    for name in narrow:
        weight = parameters[f"{name}.weight"].data
        weight.copy_(weight.to(torch.float8_e4m3fn).to(weight.dtype))
    return len(narrow)


@dataclass(frozen=True)
class Kept:
    """Bytes saved for the backward pass, each storage once: frozen weights (`stored`: those kept as bytes), others."""

    weights: int
    stored: int
    others: int


def counting_saved(run: Callable[[], object]) -> Kept:
    """Count what a forward pass saves for its backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    frozen = [tensor for tensor in kept.values() if _is_frozen_weight(tensor)]
    narrow = [tensor for tensor in frozen if tensor.dtype == torch.uint8]
    everything, weights, stored = (
        sum(tensor.untyped_storage().nbytes() for tensor in group) for group in (kept.values(), frozen, narrow)
    )
    return Kept(weights, stored, everything - weights)


def _is_frozen_weight(tensor: Tensor) -> bool:
    owner = tensor if tensor._base is None else tensor._base
    return isinstance(owner, nn.Parameter) and not owner.requires_grad
