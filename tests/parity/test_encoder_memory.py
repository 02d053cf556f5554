"""What frozen VAEs hold while they encode or decode: without values, against the same modules at work on the CPU."""

from itertools import pairwise

import pytest
import torch

from diffsynth_core.models.activation_memory import LiveBytes, StepInputs, measure_decoder, measure_encoders
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.size_facts import StepSizes

WITHIN = 0.1
HEIGHT, WIDTH = 64, 96
TINY = {
    "flux": {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 32},
    "flux2": {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 32},
    "qwen-image": {"base_dim": 16},
    "wan": {"base_dim": 16},
    "wan ti2v": {"base_dim": 16, "decoder_base_dim": 16},
}
"""Few channels: what counts is the order in which maps come and go."""


def encoders_of(name: str):
    """The family, the encoders of a kind of its models that make latents, and the configuration of its VAE."""
    family = name.partition(" ")[0]
    facts = FAMILIES[family]
    variant = facts.variant({}, (), "Wan-AI/Wan2.2-TI2V-5B" if name == "wan ti2v" else "")
    published = [known for known in facts.published if known.component == "vae"]
    config = {**published[0 if name == "wan ti2v" else -1].config, **TINY[name]}
    return load_family(family), variant, tuple(encoder for encoder in variant.encoders if encoder.latents), config


@pytest.mark.parametrize(("name", "frames"), [*((name, 1) for name in TINY), ("wan", 9), ("wan ti2v", 9)])
def test_a_vae_holds_what_is_measured_without_values(name, frames):
    family, variant, encoders, config = encoders_of(name)
    sizes = StepSizes(1, ((frames, HEIGHT, WIDTH),), 0)
    measured = measure_encoders(family, "vae", config, torch.float32, StepInputs(variant, encoders, sizes))
    vae = family.build("vae", config).eval()
    sample = {variant.target.column: torch.randn(3, frames, HEIGHT, WIDTH)}
    with torch.no_grad(), LiveBytes([*vae.parameters(), *vae.buffers(), *sample.values()]) as live:
        for encoder in encoders:
            family.encode(encoder, {"vae": vae}, sample)
    assert measured == pytest.approx(live.peak, rel=WITHIN)


@pytest.mark.parametrize(("name", "frames"), [*((name, 1) for name in TINY), ("wan", 9), ("wan ti2v", 9)])
def test_a_vae_that_decodes_holds_what_is_measured_without_values(name, frames):
    family, variant, encoders, config = encoders_of(name)
    (encoder,) = (one for one in encoders if variant.target.column in one.columns)
    sizes = StepSizes(1, ((frames, HEIGHT, WIDTH),), 0)
    measured = measure_decoder(family, "vae", config, torch.float32, StepInputs(variant, (encoder,), sizes))
    vae = family.build("vae", config).eval()
    with torch.no_grad():
        sample = {variant.target.column: torch.randn(3, frames, HEIGHT, WIDTH)}
        latents = family.encode(encoder, {"vae": vae}, sample)["latents"][None]
        with LiveBytes([*vae.parameters(), *vae.buffers(), latents]) as live:
            family.decode({"vae": vae}, latents)
    assert measured == pytest.approx(live.peak, rel=WITHIN)


@pytest.mark.parametrize("measure", [measure_encoders, measure_decoder])
@pytest.mark.parametrize("name", ["wan", "wan ti2v"])
def test_each_further_piece_of_a_clip_adds_the_same(name, measure):
    """Long clips are not measured whole."""
    family, variant, encoders, config = encoders_of(name)
    peaks = [
        measure(
            family,
            "vae",
            config,
            torch.bfloat16,
            StepInputs(variant, encoders, StepSizes(1, ((frames, HEIGHT, WIDTH),), 0)),
        )
        for frames in (9, 13, 17, 21)
    ]
    differences = [later - earlier for earlier, later in pairwise(peaks)]
    assert len(set(differences)) == 1 and differences[0] > 0
