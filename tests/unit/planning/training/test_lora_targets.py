"""Modules that receive LoRA: suffixes of names, a regular expression if no name has the suffix, or all linear
layers.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffsynth_core.adapters.lora import add_lora, lora_weights
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import FaultsFound
from diffsynth_core.models.blocks import linear_layers_of_blocks
from diffsynth_core.models.loading import load_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.planning.training.lora_targets import kinds_of
from diffsynth_core.progress import SilentReporter
from tests.loras import TinyFamily
from tests.naming import names

BLOCKS = {
    "qwen-image": {"transformer_blocks.*": 2},
    "wan": {"blocks.*": 2},
    "flux": {"blocks.*": 2, "single_blocks.*": 2},
    "flux2": {"transformer_blocks.*": 2, "single_transformer_blocks.*": 20},
}
"""Lists of blocks in the tiny transformers, and their lengths."""
LAYERS = {
    "qwen-image": {
        "transformer_blocks.*": {
            *("img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            *(f"{half}_mlp.net.{layer}" for half in ("img", "txt") for layer in ("0.proj", "2")),
        }
    },
    "wan": {
        "blocks.*": {f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"} | {"ffn.0", "ffn.2"}
    },
    "flux": {
        "blocks.*": {
            *(f"attn.{half}_{name}" for half in "ab" for name in ("to_qkv", "to_out")),
            *(f"{name}_{half}.{layer}" for half in "ab" for name, layer in (("norm1", "linear"), ("ff", 0), ("ff", 2))),
        },
        "single_blocks.*": {"norm.linear", "to_qkv_mlp", "proj_out"},
    },
    "flux2": {
        "transformer_blocks.*": {
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            *(f"{part}.{name}" for part in ("ff", "ff_context") for name in ("linear_in", "linear_out")),
        },
        "single_transformer_blocks.*": {"attn.to_qkv_mlp_proj", "attn.to_out"},
    },
}
"""The linear layers of one block, by hand from the published models."""
PATTERNS = {
    "qwen-image": (r"transformer_blocks\.1\.attn\.to_[qk]", {"transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k"}),
    "wan": (r"blocks\.0\.(self|cross)_attn\.o", {"blocks.0.self_attn.o", "blocks.0.cross_attn.o"}),
    "flux": (r"(single_)?blocks\.1\..*to_qkv(_mlp)?", {"blocks.1.attn.a_to_qkv", "blocks.1.attn.b_to_qkv", "single_blocks.1.to_qkv_mlp"}),
    "flux2": (r"single_transformer_blocks\.1[78]\.attn\.to_out", {f"single_transformer_blocks.{block}.attn.to_out" for block in (17, 18)}),
}  # fmt: skip


def modules_for(tiny: TinyFamily, targets: str, component: str = "dit") -> tuple[str, ...]:
    plan = tiny.plan(output_path="unused", lora_base_model=component, lora_target_modules=targets)
    return plan.training.lora_modules


def problems_of(tiny: TinyFamily, targets: str, component: str = "dit") -> list[str]:
    with pytest.raises(FaultsFound) as caught:
        modules_for(tiny, targets, component)
    return [problem.message for problem in caught.value.problems]


def test_an_empty_list_chooses_all_linear_layers_of_blocks(tiny):
    plan = tiny.plan(output_path="unused", lora_target_modules="")
    kinds = kinds_of((*plan.training.lora_modules, *plan.training.untrainable_targets))
    assert {blocks: set(names) for blocks, names in kinds.items()} == LAYERS[tiny.name]
    for blocks, number in BLOCKS[tiny.name].items():
        assert set(kinds[blocks].values()) == {number}
    assert plan.training.lora_rule == names("linear layers", "blocks")
    dead = {"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}
    expected = {f"transformer_blocks.1.{name}" for name in dead} if tiny.name == "qwen-image" else set()
    assert set(plan.training.untrainable_targets) == expected


def test_not_given_is_the_documented_list_not_that_choice(tiny):
    resolved = resolve(tiny.flags(output_path="unused"))
    parameters = resolved.parameters.model_copy(update={"lora_target_modules": None})
    training = make_plan(replace(resolved, parameters=parameters), SilentReporter(), base=tiny.base).training
    assert training.lora_modules == tiny.plan(output_path="unused").training.lora_modules, "as the recipe lists them"
    assert training.lora_rule is None


def test_a_value_no_name_ends_with_is_a_pattern_for_whole_names(tiny):
    pattern, expected = PATTERNS[tiny.name]
    assert set(modules_for(tiny, pattern)) == expected
    assert problems_of(tiny, f"{pattern}X")[0] == names("no module", "dit")


@pytest.mark.parametrize("part", [r"transformer_blocks\.\d", r"to_[qk]", r"attn\.to_q|transformer_blocks"])
def test_a_pattern_for_a_part_of_names_addresses_nothing(says, tiny_families, part):
    told = problems_of(tiny_families("qwen-image"), part)
    says("\n".join(told))
    assert told == [names("lora_target_modules", "no module", "dit", part, "regular expression")]


def test_a_value_that_names_end_with_is_no_pattern(tiny_families):
    """As a pattern `ffn.0` would only match full names, and as a suffix pattern it would match `ffnX0` too."""
    tiny = tiny_families("wan")
    assert modules_for(tiny, "ffn.0") == ("blocks.0.ffn.0", "blocks.1.ffn.0")
    assert modules_for(tiny, "q,k") == tuple(
        sorted(f"blocks.{n}.{part}_attn.{name}" for n in (0, 1) for part in ("self", "cross") for name in "qk")
    )


def test_several_values_are_ends_of_names_only(tiny):
    pattern, _ = PATTERNS[tiny.name]
    last = tiny.facts.component("dit").lora_targets[0]
    [message] = problems_of(tiny, f"{last},{pattern}")
    assert message == names("lora_target_modules", "no module", "dit", pattern, "regular expression")


def test_a_pattern_in_a_list_of_one_may_hold_commas():
    assert Parameters(lora_target_modules=["blocks.{1,3}q"]).lora_target_modules == ("blocks.{1,3}q",)


@pytest.mark.parametrize("pattern", ["attn.to_(q", "*to_q", "[", "blocks\\.(?P<a"])
def test_what_is_no_regular_expression_is_told(says, tiny_families, pattern):
    [message] = problems_of(tiny_families("qwen-image"), pattern)
    says(message)
    assert message == names("lora_target_modules", pattern, "regular expression") and message[-2:] != ": "


def test_other_components_can_be_chosen_from_too(tiny):
    """They have no documented list: unset is rejected, empty selects the linear layers of their blocks."""
    component = next(name for name in tiny.facts.component_names if name.startswith("text_encoder"))
    kinds = kinds_of(modules_for(tiny, "", component))
    assert all(blocks for blocks in kinds) and sum(names.total() for names in kinds.values()) > 4
    assert not any("embed" in name or "norm" in name or "bias" in name for names in kinds.values() for name in names)


def test_a_component_without_linear_layers_in_blocks(says, tiny_families):
    told = problems_of(tiny_families("qwen-image"), "", "vae")
    says("\n".join(told))
    assert told == [names("lora_target_modules", "is empty", "vae")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.table = nn.Linear(2, 3), nn.LayerNorm(2), nn.Embedding(4, 2)
        self.net = nn.Sequential(nn.GELU(), nn.Linear(2, 2))
        self.out = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])
        self.conv = nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize(("number", "expected"), [(2, {"layer", "net.1", "out.0"}), (1, set()), (0, set())])
def test_linear_layers_below_a_list_of_several_blocks_alone(number, expected):
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(number))
    model.head = nn.Linear(2, 2)
    model.embedder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert linear_layers_of_blocks(model) == {f"blocks.{block}.{name}" for block in range(number) for name in expected}


def test_kinds():
    modules = ["blocks.0.attn.q", "blocks.11.attn.q", "blocks.0.ffn.0", "head.head", "a.b.3.c.0.d"]
    assert kinds_of(modules) == {
        "blocks.*": Counter({"attn.q": 2, "ffn.0": 1}), "": Counter({"head.head": 1}), "a.b.*": Counter({"c.0.d": 1})
    }  # fmt: skip


def test_every_chosen_module_takes_a_lora(tiny):
    """peft applies LoRA to each selected module."""
    plan = tiny.plan(output_path="unused", lora_target_modules="")
    files = plan.model.components["dit"]
    module = load_component(load_family(tiny.name), files, torch.float32, torch.device("cpu"), SilentReporter())
    add_lora(module, plan.training.lora_modules, 2, 0, files.layout.public_keys)
    assert lora_weights(module, files.layout.public_keys).keys() == set(plan.training.lora_modules)
