"""Operations of a training step by formula, against those that PyTorch counts of the modules of published sizes.

The modules are on the meta device: shapes without values, so that the largest models take no memory.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.block_swap import block_of
from diffsynth_core.models.prepare import prepare_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.planning.memory.activations import component_setup, step_components
from diffsynth_core.planning.memory.flops import step_flops
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter

WITHIN = 0.02
BLOCKS = 8
"""Of each kind, at most; the formula counts a few gradients of the first and the last block that are not needed."""
IMAGE = ((1, 1024, 1024),)
CLIP = ((81, 480, 832),)
RECIPES = {
    "qwen-image": ("qwen-image-{}", StepSizes(1, IMAGE, 256)),
    "qwen-image edit": ("qwen-image-edit-2509-{}", StepSizes(2, (*IMAGE, (1, 1024, 768)), 300)),
    "flux": ("flux.1-dev-{}", StepSizes(2, IMAGE, 512)),
    "flux2": ("flux.2-klein-4b-{}", StepSizes(1, ((1, 512, 512),), 512)),
    "wan": ("wan2.1-t2v-1.3b-{}", StepSizes(1, CLIP, 512)),
    "wan i2v": ("wan2.1-i2v-14b-480p-{}", StepSizes(1, CLIP, 512)),
    "wan ti2v": ("wan2.2-ti2v-5b-{}", StepSizes(1, ((49, 480, 832),), 512)),
}
"""Recipes and sizes of a micro-batch."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention as on a GPU: the meta device would multiply whole matrices of scores."""
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return attended


def make(recipe: str, folder: Path, **parameters: object) -> RunPlan:
    given = {"recipe": recipe, "output_path": folder / "out", "cache_path": folder / "cache", **parameters}
    return make_plan(resolve(given), SilentReporter(), base=folder / "models", without_files=True)


def shortened(plan: RunPlan) -> RunPlan:
    """A plan of a model with few blocks of each kind, in as wide layers."""

    def built(component: str, name: str) -> bool:
        block = block_of(name, plan.model.facts.component(component))
        return block is None or int(block.rpartition(".")[2]) < BLOCKS

    shapes = {
        component: {name: shape for name, shape in tensors.items() if built(component, name)}
        for component, tensors in plan.model.shapes.items()
    }
    keys = plan.model.components["dit"].layout.public_keys
    modules = [name for name in plan.training.lora_modules if built("dit", (keys.to_targets(name) or ("",))[0])]
    training = replace(plan.training, lora_modules=tuple(modules))
    return replace(plan, model=replace(plan.model, shapes=shapes), training=training)


def counted(plan: RunPlan, sizes: StepSizes) -> float:
    """Operations of a step that PyTorch counts."""
    family = load_family(plan.model.facts.name)
    modules = {}
    for name in step_components(plan):
        published = plan.model.published[name].config
        lists = plan.model.facts.component(name).blocks.values()
        config = {**published, **{blocks: min(BLOCKS, published[blocks]) for blocks in lists}}
        with torch.device("meta"):
            module = modules[name] = family.build(name, config)
        rank = plan.parameters.lora_rank
        prepare_component(family, name, module, component_setup(plan, name, plan.model.shapes[name], rank))
    with torch.device("meta"):
        encoded = [family.blank_encoding(plan.model.variant, modules["dit"], sizes) for _ in range(sizes.batch)]
        sigma = torch.empty(sizes.batch)
    batch = family.collate(encoded)
    with FlopCounterMode(display=False) as counter:
        family.predict_velocity(modules, torch.empty_like(batch["latents"]), sigma, batch).sum().backward()
    return counter.get_total_flops()


WAYS = {
    True: {"use_gradient_checkpointing": True},
    False: {"use_gradient_checkpointing": False},
    **{
        kind: {"use_gradient_checkpointing": True, "checkpointing": kind}
        for kind in ("nested", "keep_attention", "keep_every_2")
    },
}
CASES = [
    (name, kind, checkpointing) for name in RECIPES for kind in ("lora", "full") for checkpointing in (True, False)
]
CASES += [(name, "lora", kind) for name in RECIPES for kind in ("nested", "keep_attention", "keep_every_2")]
SHORT = {("qwen-image", "lora", True), ("flux", "full", False), ("flux2", "lora", True), ("wan", "lora", True)}


@pytest.mark.parametrize(
    ("name", "kind", "checkpointing"),
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.long) for case in CASES],
)
def test_the_formula_is_what_pytorch_counts(name, kind, checkpointing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    recipe, sizes = RECIPES[name]
    plan = shortened(make(recipe.format(kind), tmp_path, **WAYS[checkpointing]))
    assert step_flops(plan, sizes).total == pytest.approx(counted(plan, sizes), rel=WITHIN)
