"""Frozen weights in 8-bit floats against the same rounded weights in the compute dtype, in each family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.models.loading import load_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encoder_inputs import load_tokenizers, scale_pixels
from diffsynth_core.progress import SilentReporter
from diffsynth_core.training.encode import load_columns
from tests.covering import covering
from tests.parity.float8_runs import RECIPES, Step, counting_saved, plan_step, round_weights

CPU = torch.device("cpu")


def float8_count(module: torch.nn.Module) -> int:
    return sum(isinstance(layer, StoredLinear) for layer in module.modules())


def check_gradients(folder: Path, family: str, component: str = "dit", **settings: object) -> None:
    """Compare one step with a component stored in 8-bit floats and one with the same values in the compute dtype."""
    plan = plan_step(family, folder, (component,), **settings)
    stored, wide = Step(plan), Step(plan_step(family, folder, **settings))
    unrounded = wide.gradients()
    wide.model.zero_grad()
    count = round_weights(plan, component, wide.model.components[component])
    assert count == float8_count(stored.model.components[component]) > 10
    ours, theirs = stored.gradients(), wide.gradients()
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name
        assert gradient.abs().max() > 0, name
    # Rounding must show, or the comparison would prove nothing.
    assert any(not torch.equal(gradient, unrounded[name]) for name, gradient in ours.items())


@pytest.mark.parametrize(("family", "recompute", "precision"), covering(RECIPES, (False, True), ("no", "bf16")))
def test_lora_gradients_are_those_of_the_rounded_weights(family, recompute, precision, folder):
    check_gradients(folder, family, use_gradient_checkpointing=recompute, mixed_precision=precision)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_so_are_those_of_a_lora_on_a_text_encoder(recompute, folder):
    targets = ["language_model.layers.0.self_attn.q_proj", "language_model.layers.1.mlp.down_proj"]
    lora = {"lora_base_model": "text_encoder", "lora_target_modules": targets}
    check_gradients(folder, "qwen-image", "text_encoder", use_gradient_checkpointing=recompute, **lora)


def test_so_are_those_of_weights_loaded_into_host_memory_first(folder):
    check_gradients(folder, "qwen-image", initialize_model_on_cpu=True)


@pytest.mark.parametrize(("family", "precision"), covering(RECIPES, ("no", "bf16")))
def test_autograd_keeps_nothing_of_stored_weights(family, precision, folder):
    """It saves the same apart from weights."""
    kept = {}
    for components in (("dit",), ()):
        settings = {"mixed_precision": precision, "use_gradient_checkpointing": False}
        step = Step(plan_step(family, folder, components, **settings))
        kept[components] = counting_saved(step.gradients)
    stored, wide = kept[("dit",)], kept[()]
    assert stored.others == wide.others > 0
    assert stored.stored == 0 and stored.weights < wide.weights / 2


ENCODED = [*RECIPES.values(), "wan2.1-i2v-14b-480p-lora", "qwen-image-edit-2509-lora"]


@pytest.mark.parametrize(("recipe", "precision"), covering(ENCODED, (torch.float32, torch.bfloat16)))
def test_encoders_make_what_the_rounded_weights_make(recipe, precision, folder):
    """T5 asks its layers, and vision towers ask their models, which dtype to compute in."""
    plan = plan_step(recipe, folder)
    family = load_family(plan.model.facts.name)
    changed = set()
    for encoder in plan.model.variant.encoders:
        files = plan.model.components[encoder.component]
        columns = scale_pixels(load_columns(plan, encoder, plan.data.samples.samples[0]), CPU)
        made = []
        for kind in ("wide", "rounded", "stored"):
            chosen = replace(files, storage="float8" if kind == "stored" else "plain")
            module = load_component(family, chosen, precision, CPU, SilentReporter())
            if kind == "rounded":
                round_weights(plan, encoder.component, module)
            assert module.dtype == precision
            known = {encoder.component: module, **load_tokenizers(plan.model, family, encoder.component)}
            with torch.no_grad():
                made.append(family.encode(encoder, known, columns))
        wide, rounded, stored = made
        assert all(torch.equal(tensor, rounded[name]) for name, tensor in stored.items())
        assert all(tensor.dtype == wide[name].dtype for name, tensor in stored.items())
        changed |= {encoder.component} if any(not torch.equal(t, wide[n]) for n, t in stored.items()) else set()
    assert changed >= {name for name in plan.model.components if "encoder" in name}
