"""ControlNets: inferred configurations, supported ones, and their unused parameters."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.models import control
from diffsynth_core.models.control import count_added
from diffsynth_core.models.flux import keys as flux_names
from diffsynth_core.models.flux import tiny as tiny_flux
from diffsynth_core.models.flux.forward import predict_velocity as predict_flux
from diffsynth_core.models.qwen_image import keys as qwen_names
from diffsynth_core.models.qwen_image import tiny as tiny_qwen
from diffsynth_core.models.qwen_image.forward import predict_velocity as predict_qwen
from diffsynth_core.models.recognition import find_unsupported, recognize, recognize_family
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.size_facts import LatentFacts
from diffsynth_core.models.spec import ComponentFiles, EncoderFacts
from diffsynth_core.models.tiny import fill
from tests.gradients import unused_parameters

NAMES = {"qwen-image": qwen_names, "flux": flux_names}
TINY: dict[str, Any] = {"qwen-image": tiny_qwen, "flux": tiny_flux}


@cache
def module_of(family: str, component: str, **changed: int) -> nn.Module:
    """Return a tiny component with random weights."""
    tiny = TINY[family]
    config = tiny.CONFIGS[component](tiny.TinySizes()) | changed
    module = load_family(family).build(component, config)
    fill(module, 0.5, seed=len(component))
    return module


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# Which there are


@pytest.mark.parametrize("family", NAMES)
def test_a_controlnet_is_told_from_the_transformer(family):
    for component in ("dit", "controlnet"):
        names = module_of(family, component).state_dict().keys()
        found = recognize(names, FAMILIES[family])
        assert found is not None and found[0].name == component
        assert recognize_family(names) is (FAMILIES[family] if component == "dit" else None)


@pytest.mark.parametrize(
    ("family", "names", "title"),
    [
        ("flux", {"controlnet_x_embedder.weight", "controlnet_mode_embedder.weight"}, "a union ControlNet"),
        ("flux", {"controlnet_x_embedder.weight", "input_hint_block.conv_in.weight"}, "a ControlNet with pixel inputs"),
        ("qwen-image", {"controlnet_blocks.0.x_rms.weight", "controlnet_blocks.0.y_rms.weight"}, "a blockwise"),
    ],
)
def test_other_controlnets_are_told_what_they_are(family, names, title):
    known = module_of(family, "controlnet").state_dict().keys()
    unsupported = find_unsupported(known | names, FAMILIES[family])
    assert unsupported is not None and unsupported.title.startswith(title) and unsupported.component == "controlnet"
    assert recognize(known | names, FAMILIES[family]) is None


def test_the_controlnet_of_the_other_family_is_told():
    for family, other in (("qwen-image", "flux"), ("flux", "qwen-image")):
        unsupported = find_unsupported(module_of(other, "controlnet").state_dict().keys(), FAMILIES[family])
        assert unsupported is not None and unsupported.title == f"a {FAMILIES[other].title} ControlNet"
        assert find_unsupported(module_of(family, "controlnet").state_dict().keys(), FAMILIES[family]) is None


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("qwen-image", {"num_layers": 3}),
        ("qwen-image", {"extra_condition_channels": 4}),
        ("flux", {"num_layers": 3, "num_single_layers": 0}),
        ("flux", {"guidance_embeds": False}),
        ("flux", {}),
    ],
)
def test_the_configuration_is_read_off_shapes(family, changed):
    module = module_of(family, "controlnet", **changed)
    files = ComponentFiles("controlnet", "x", (), None)
    inferred = load_family(family).config_of(files, shapes_of(module))
    ours = load_family(family).build("controlnet", inferred)
    known = {name: value for name, value in module.config.items() if not name.startswith("_") and name in inferred}
    assert {name: inferred[name] for name in known} == known
    assert shapes_of(ours) == shapes_of(module)


def test_published_sizes_are_inferred():
    """InstantX's for Qwen-Image and jasperai's for FLUX.1, as diffusers builds them, on the meta device."""
    published = {
        "qwen-image": {"num_layers": 5},
        "flux": {"num_layers": 5, "num_single_layers": 0, "guidance_embeds": True},
    }
    for family, changed in published.items():
        with torch.device("meta"):
            module = load_family(family).build("controlnet", changed)
        inferred = load_family(family).config_of(ComponentFiles("controlnet", "x", (), None), shapes_of(module))
        assert inferred["num_layers"] == 5 and inferred["attention_head_dim"] == 128
        assert inferred["num_attention_heads"] == 24 and inferred["axes_dims_rope"] == [16, 56, 56]
        assert all(inferred[name] == value for name, value in changed.items())


# What no gradient reaches


@pytest.mark.parametrize("blocks", range(1, 13))
@pytest.mark.parametrize("outputs", range(1, 13))
def test_the_outputs_that_are_added_are_those_diffusers_picks(blocks, outputs):
    interval = -(-blocks // outputs)
    assert {block // interval for block in range(blocks)} == set(range(count_added(outputs, blocks)))


def test_nothing_is_added_of_nothing():
    assert count_added(0, 3) == count_added(3, 0) == 0


QWEN = [(1, 1), (2, 2), (1, 3), (4, 3), (3, 2)]
"""Blocks of the transformer and of the ControlNet."""
FLUX = [(1, 1, 1, 1), (1, 3, 2, 2), (2, 2, 1, 3), (4, 3, 2, 0), (1, 3, 2, 0), (3, 1, 4, 3)]
"""The same, and the blocks of single streams."""


@pytest.mark.parametrize("sizes", [*QWEN, *FLUX], ids=str)
def test_exactly_the_parameters_that_are_known_to_be_dead_get_no_gradient(sizes):
    """For each number of blocks, by a backward pass of the real models."""
    family = "qwen-image" if len(sizes) == 2 else "flux"
    kinds = ("num_layers", "num_single_layers")
    transformer = module_of(family, "dit", **dict(zip(kinds, sizes[::2], strict=False)))
    controlnet = module_of(family, "controlnet", **dict(zip(kinds, sizes[1::2], strict=False)))
    transformer.requires_grad_(False)
    controlnet.zero_grad()
    predict(family, transformer, controlnet).pow(2).sum().backward()
    reached = {name for name, tensor in controlnet.named_parameters() if tensor.grad is not None and tensor.grad.any()}
    names = {name for name, _ in controlnet.named_parameters()}
    variant = FAMILIES[family].variant({"dit": shapes_of(transformer)}, (control.CONTROLNET_IMAGE,), "")
    dead = unused_parameters(FAMILIES[family], "controlnet", controlnet, variant)
    assert names - reached == dead
    if family == "qwen-image" or sizes[3] == 0:
        assert dead, "the text ends somewhere"


def predict(family: str, transformer: nn.Module, controlnet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, followed = torch.randn(2, 1, 16, 1, 4, 4, generator=generator)
    batch = {
        "controlnet_latents": followed,
        "prompt_embeds": torch.randn(1, 5, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }
    verb = predict_qwen if family == "qwen-image" else predict_flux
    return verb(transformer, noisy, torch.tensor([0.5]), batch, controlnet)


# What a model with a ControlNet is


@pytest.mark.parametrize(("family", "other"), [("qwen-image", "edit_image"), ("flux", "kontext_images")])
def test_with_an_image_to_follow_the_controlnet_takes_part_in_every_step(family, other):
    facts = FAMILIES[family]
    plain = facts.variant({}, (), "")
    assert (
        "controlnet" not in plain.components
        and "controlnet_image" in plain.accepted_inputs
        and plain.step_components == ()
    )
    for inputs in (("controlnet_image",), ("controlnet_image", other)):
        found = facts.variant({}, inputs, "")
        assert found.components == (*plain.components, "controlnet")
        assert (found.step_components, found.accepted_inputs) == (("controlnet",), ("controlnet_image",)), (
            f"{other} is told to be too much"
        )
        (shown,) = found.conditions
        assert (shown.column, shown.size, shown.max_count) == ("controlnet_image", "target", 1)
        latents = LatentFacts(channels=16, factor=8)
        assert found.encoders == (
            *plain.encoders,
            EncoderFacts("controlnet_latents", "vae", ("controlnet_image",), latents=latents),
        )


@pytest.mark.parametrize("family", NAMES)
def test_tiny_controlnets_lie_where_their_repositories_have_them(tmp_path: Path, family):
    place = "diffusion_pytorch_model.safetensors"
    load_family(family).write_tiny_weights(tmp_path, "controlnet", "InstantX/A-ControlNet", place)
    folder = tmp_path / "InstantX/A-ControlNet"
    assert {path.name for path in folder.iterdir()} == {place, "config.json"}


@pytest.mark.parametrize("family", NAMES)
def test_recomputing_activations_is_switched_on(family):
    controlnet = load_family(family).build("controlnet", TINY[family].CONFIGS["controlnet"](TINY[family].TinySizes()))
    load_family(family).checkpoint_gradients("controlnet", controlnet)
    assert controlnet.gradient_checkpointing
