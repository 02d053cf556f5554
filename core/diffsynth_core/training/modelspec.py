"""What a LoRA file states about itself for other programs: https://github.com/Stability-AI/ModelSpec, version 1.0.0."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

from diffsynth_core.planning.plan import RunPlan

BASE = "diffsynth.base"
"""Metadata key of a JSON object: file name of the base -> sha256. The specification has no key for it."""


def modelspec(plan: RunPlan, step: int, averaged: bool) -> Mapping[str, str]:
    """Return the metadata of a LoRA of the denoiser; of other checkpoints there is none.

    Only what the run knows, and what is the same for equal runs: no date, no name of its folder. A trigger phrase would
    need a parameter, and `hash_sha256` the tensors, which are written after the metadata.

    Args:
        averaged: whether the file has the moving averages of the weights.
    """
    facts, variant, training = plan.model.facts, plan.model.variant, plan.training
    architecture = facts.architecture(variant.model_id)
    if training.lora_component != facts.denoiser or training.full or training.parts or architecture is None:
        return {}
    shapes = (sample.target.shape for sample in plan.data.samples.samples)
    _, height, width = max(shapes, key=lambda shape: (shape[1] * shape[2], shape))
    identities = plan.encodings.identities[facts.denoiser]
    base = {PurePosixPath(label).name: digest for label, digest in identities.items() if not label.endswith(".json")}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": facts.repository,
        "modelspec.title": f"LoRA of {variant.title}, step {step}{', averaged weights' if averaged else ''}",
        "modelspec.resolution": f"{width}x{height}",
        BASE: json.dumps(base, sort_keys=True, separators=(",", ":")),
    }
