"""Predicted sizes of encodings against the tensors that encoders of every family produce."""

from dataclasses import replace
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.dataset_report.rules import CaptionRule, rules_of
from diffsynth_core.dataset_report.set_checks import encoded_bytes, shapes_of
from diffsynth_core.dataset_report.thresholds import Thresholds
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.models.encoded_sizes import EncodedSize
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.rehearsal.preparation import prepare
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.setup import make_accelerator

RECIPES = (
    "qwen-image-lora",
    "qwen-image-edit-lora",
    "qwen-image-edit-2509-lora",
    "wan2.1-t2v-1.3b-lora",
    "wan2.1-i2v-14b-480p-lora",
    "wan2.2-i2v-a14b-lora",
    "wan2.2-ti2v-5b-lora",
    "flux.1-dev-lora",
    "flux.1-kontext-dev-lora",
    "flux.2-klein-4b-lora",
    "flux.2-klein-9b-lora",
)
TI2V_MARKS = 1e-3
"""Fraction of elements in masks of clean latent frames, which are not counted."""


@pytest.fixture(params=RECIPES)
def plan(request: pytest.FixtureRequest, folder: Path) -> RunPlan:
    """The plan of a rehearsal with encoded samples."""
    reporter = SilentReporter()
    given = {"recipe": request.param, "device": "cpu", "cache_path": str(folder / "cache"), "dataset_num_workers": 0}
    given |= {"output_path": str(folder / "out"), "max_steps": 64, "mixed_precision": "no"}
    first = resolve(given) if "wan2.2-i2v" not in request.param else resolve(given | {"only": "high"})
    plain, base = prepare(first, reporter)
    plan = make_plan(plain, reporter, base=base)
    plan = with_encodings(plan, reporter)
    fill_cache(plan, load_family(plan.model.facts.name), make_accelerator(plan), reporter, StopRequest())
    return plan


def made(plan: RunPlan) -> EncodedSize:
    """Return the number of elements in the cache."""
    total = EncodedSize()
    for part in plan.encodings.encoders:
        for index in range(len(plan.data.samples.samples)):
            numbers = sum(tensor.numel() for tensor in part.cache.read(part.key(index)).values())
            total += EncodedSize(wide=numbers) if part.encoder.latents else EncodedSize(narrow=numbers)
    return total


def test_sizes_are_those_of_the_tensors_that_encoders_make(plan):
    foretold, measured = find_workload(plan), made(plan)
    assert foretold.counted
    assert foretold.encoded.narrow == measured.narrow
    assert foretold.encoded.wide == pytest.approx(
        measured.wide, rel=TI2V_MARKS if plan.model.variant.num_conditioning_frames else 0
    )


def test_the_report_of_the_dataset_foretells_the_same(plan):
    parameters = plan.parameters
    rules = rules_of(parameters, plan.model.facts, plan.model.variant, Thresholds(), "a recipe")
    (caption,) = (encoder.caption for encoder in plan.model.variant.encoders if encoder.caption)
    rules = replace(rules, captions=CaptionRule(caption, plan.model.tokenizers.get(caption.tokenizer)))
    _, dataset = validate(parameters.dataset_base_path, rules, CheckOptions("files", workers=1), SilentReporter())
    published = find_workload(replace(plan, model=replace(plan.model, shapes={}))).encoded
    assert encoded_bytes(dataset, shapes_of(dataset)) == (published.wide * 4 + published.narrow * 2, True)
