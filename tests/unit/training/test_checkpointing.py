"""Content of checkpoints: full weights with the keys of a layout, LoRA with those of its format."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffsynth_core.adapters.lora import add_lora
from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, Layout
from diffsynth_core.planning.training.targets import Training
from diffsynth_core.training.checkpointing import checkpoint_content
from diffsynth_core.weights.key_maps import SAME_NAMES, TableMap

FILE = TableMap({"o": "to_out"}, fused={"qkv": ("to_q", "to_k")}, swap_halves={"mod": "norm"})
TYPED = TableMap({"typed_o": "to_out", "typed_mod": "norm"}, fused={"typed_qkv": ("to_q", "to_k")})
PAIRS = TableMap({}, fused={"one": ("to_q", "to_k"), "other": ("to_out", "norm")})
NAMES = ("to_q", "to_k", "to_out", "norm")


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in NAMES})


def content(
    layout: Layout, lora: bool = False, stored_names: tuple[str, ...] = NAMES, part: str = "", **parameters: object
):
    training = Training(("dit",), None, (), ())
    if lora or part:
        training = Training((), "dit" if lora else None, (), (), parts={"dit": (part,)} if part else {})
    facts = ComponentFacts("dit", "dit", (layout,), (), lora_key_maps={"kohya": FILE})
    model = module()
    if lora:
        add_lora(model, ["typed_qkv", "typed_o"], 1, 0, layout.public_keys)
    plan = SimpleNamespace(
        training=training,
        model=SimpleNamespace(
            components={"dit": ComponentFiles("dit", "x", (), None, layout)},
            facts=SimpleNamespace(component=lambda name: facts),
        ),
        parameters=Parameters.model_validate(parameters),
    )
    stored = {f"{name}.weight": "BF16" for name in stored_names}
    return checkpoint_content(plan, SimpleNamespace(components={"dit": model}, stored_dtypes={"dit": stored}))


LAYOUT = Layout(frozenset(), public_keys=TYPED)


def test_without_more_full_weights_have_their_documented_names():
    tensors = content(LAYOUT, remove_prefix_in_ckpt="").tensors
    assert set(tensors) == {f"pipe.dit.typed_{name}.weight" for name in ("o", "mod", "qkv")}


def test_a_layout_states_the_names_of_full_checkpoints():
    found, weights = content(replace(LAYOUT, saved_keys=FILE)), module().state_dict()
    assert set(found.tensors) == {"o.weight", "qkv.weight", "mod.weight"}
    assert torch.equal(found.tensors["o.weight"], weights["to_out.weight"])
    assert torch.equal(found.tensors["qkv.weight"], torch.cat((weights["to_q.weight"], weights["to_k.weight"])))
    assert torch.equal(found.tensors["mod.weight"], weights["norm.weight"].flip(0))
    assert found.dtypes == dict.fromkeys(found.tensors, torch.bfloat16)
    same = content(replace(LAYOUT, saved_keys=SAME_NAMES)).tensors
    assert set(same) == weights.keys()


def test_matrices_are_joined_one_by_one(monkeypatch, tmp_path):
    """Twice each, for shape and values, and never two at a time."""
    joined: list[str] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    join = TableMap.fuse

    def counted(table, name, tensors):
        assert not any(tensor() is not None for tensor in alive), "the last one is still held"
        tensor = join(table, name, tensors)
        joined.append(name)
        if len(table.to_targets(name)) > 1:
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TableMap, "fuse", counted)
    found = content(replace(LAYOUT, public_keys=PAIRS), remove_prefix_in_ckpt="pipe.dit.")
    assert joined == []
    write_tensors(tmp_path / "full.safetensors", found.tensors, {}, found.dtypes)
    assert sorted(joined) == ["one.weight", "one.weight", "other.weight", "other.weight"]
    weights = module().state_dict()
    rows = torch.cat((weights["to_out.weight"], weights["norm.weight"])).bfloat16()
    assert torch.equal(load_file(tmp_path / "full.safetensors")["other.weight"], rows)


def test_what_the_base_file_lacks_is_another_name_of_what_it_has_and_left_out():
    found = content(LAYOUT, stored_names=NAMES[:3], remove_prefix_in_ckpt="")
    assert set(found.tensors) == {"pipe.dit.typed_o.weight", "pipe.dit.typed_qkv.weight"}


@pytest.mark.parametrize(("written", "name"), [(None, "typed_qkv"), (FILE, "qkv")])
def test_of_a_component_that_trains_in_part_that_part_alone_is_held(written, name):
    """With the keys of full checkpoints."""
    found = content(replace(LAYOUT, saved_keys=written), part="typed_qkv")
    assert set(found.tensors) == {f"{name}.weight"}
    assert found.dtypes == {f"{name}.weight": torch.bfloat16}


def test_a_part_with_a_lora_holds_its_weights_and_the_lora():
    found = content(LAYOUT, lora=True, part="typed_o").tensors
    assert set(found) == {
        *("typed_o.weight", "typed_o.lora_A.default.weight", "typed_o.lora_B.default.weight"),
        *("typed_qkv.lora_A.default.weight", "typed_qkv.lora_B.default.weight"),
    }
    assert torch.equal(found["typed_o.weight"], module().state_dict()["to_out.weight"])


@pytest.mark.parametrize("written", [None, FILE])
def test_a_lora_has_its_documented_names_whatever_full_checkpoints_have(written):
    tensors = content(replace(LAYOUT, saved_keys=written), lora=True, remove_prefix_in_ckpt="pipe.").tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "dit.typed_qkv.lora_A.default.weight": (1, 2),
        "dit.typed_qkv.lora_B.default.weight": (4, 1),
        "dit.typed_o.lora_A.default.weight": (1, 2),
        "dit.typed_o.lora_B.default.weight": (2, 1),
    }
