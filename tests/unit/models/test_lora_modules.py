"""The declared modules of each family's transformers, against the real classes at real sizes, without weights."""

from functools import cache

import diffusers
import pytest
import torch

from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import modules_with_weights
from diffsynth_core.weights.lora_formats import LORA_FORMATS, spell
from diffsynth_core.weights.lora_keys import match_lora_keys

FLUX = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": [16, 56, 56]}
KLEIN = {"attention_head_dim": 128, "guidance_embeds": False}
WAN = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
MODELS = {
    "qwen-image": ("QwenImageTransformer2DModel", [{"num_layers": 60, "joint_attention_dim": 3584}]),
    "flux": ("FluxTransformer2DModel", [{"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True, **FLUX}]),
    "flux2": (
        "Flux2Transformer2DModel",
        [
            {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, **KLEIN},
            {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, **KLEIN},
        ],
    ),
    "wan": (
        "WanTransformer3DModel",
        [
            {"num_attention_heads": 12, "in_channels": 16, "out_channels": 16, "ffn_dim": 8960, "num_layers": 30, **WAN},
            {
                "num_attention_heads": 40, "in_channels": 36, "out_channels": 16, "ffn_dim": 13824, "num_layers": 40,
                "image_dim": 1280, "added_kv_proj_dim": 5120, **WAN,
            },
        ],
    ),
}  # fmt: skip
"""Family -> class of its transformer, and published configurations."""


@cache
def shapes_of(family: str) -> list[dict[str, tuple[int, ...]]]:
    """Return tensor shapes of each size, by documented name."""
    class_name, sizes = MODELS[family]
    facts = FAMILIES[family]
    layout = next(layout for layout in facts.component("dit").layouts if layout.signature <= names_of(family, 0))
    found = []
    for settings in sizes:
        with torch.device("meta"):
            module = getattr(diffusers, class_name)(**settings)
        found.append(layout.public_shapes({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}))
    return found


@cache
def names_of(family: str, size: int) -> frozenset[str]:
    class_name, sizes = MODELS[family]
    with torch.device("meta"):
        return frozenset(getattr(diffusers, class_name)(**sizes[size]).state_dict())


def modules_of(family: str) -> list[frozenset[str]]:
    return [modules_with_weights(shapes) for shapes in shapes_of(family)]


@pytest.mark.parametrize("family", MODELS)
def test_every_module_of_the_real_classes_is_named_and_every_name_is_of_one(family):
    naming = FAMILIES[family].component("dit").lora_naming
    real = frozenset().union(*modules_of(family))
    assert len(real) > 60
    for modules in modules_of(family):
        assert modules <= set(naming.modules_met(modules))
    met = {pattern for pattern in naming.modules if real & set(replaced(pattern))}
    assert met == set(naming.modules)


def replaced(pattern: str) -> list[str]:
    return [pattern.replace("{}", str(number)) for number in range(60)]


@pytest.mark.parametrize("lora_format", LORA_FORMATS)
@pytest.mark.parametrize("family", MODELS)
def test_names_of_all_dialects_lead_back_to_one_module(family, lora_format):
    """With underscores too: no two modules have the same name."""
    naming = FAMILIES[family].component("dit").lora_naming
    vocabulary = naming.vocabulary(lora_format)
    for modules in modules_of(family):
        parts = {part for module in modules for part in vocabulary.parts(module)}
        texts = {spell(part, lora_format) for part in parts}
        assert len(texts) == len(parts)
        keys = [f"{LORA_FORMATS[lora_format].prefixes[0]}{text}{LORA_FORMATS[lora_format].A}" for text in sorted(texts)]
        match = match_lora_keys(keys, naming.modules_met(keys), naming)
        assert match.unmatched == () and match.lora_format(naming) == lora_format
        assert match.loras.keys() == parts
        assert {halves.A for halves in match.loras.values()} == set(keys)
        assert {module for part in parts for module in match.vocabulary.public(part)} == modules
        assert match.vocabulary.fused is (lora_format in naming.fused)


@pytest.mark.parametrize("family", ["qwen-image", "flux", "flux2"])
def test_sides_and_blocks_are_those_of_the_real_classes(family):
    """These distinguish families whose modules have the same names."""
    facts = FAMILIES[family].component("dit")
    assert facts.sides and facts.max_blocks
    for shapes in shapes_of(family):
        for pattern, (rows, columns) in facts.sides.items():
            out, into = shapes[f"{pattern.format(0)}.weight"]
            assert out * columns == into * rows, pattern
        for start, most in facts.max_blocks.items():
            met = {int(name.removeprefix(start).partition(".")[0]) for name in shapes if name.startswith(start)}
            assert met and max(met) < most


def test_dots_become_underscores_where_a_dialect_has_it_so():
    assert spell("blocks.0.attn.to_q", "kohya") == "blocks_0_attn_to_q"
    assert spell("blocks.0.attn.to_q", "comfyui") == "blocks.0.attn.to_q"
