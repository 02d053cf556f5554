"""Every prefix with every suffix and every set of module names, of every family: the same weight changes.

A spelling is read against its base, merged, and converted to every format and back. The reference is W + s B A,
computed by hand for the modules of diffusers. All spellings are read; every 12th is converted, or all with
DIFFSYNTH_TEST_SPELLINGS=all.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth_core.adapters.deltas import open_deltas
from diffsynth_core.adapters.merge import Workspace, merge_rows
from diffsynth_core.conversion.convert import plan_conversion
from diffsynth_core.conversion.lora_inputs import open_lora_file
from diffsynth_core.conversion.lora_source import open_lora
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import FamilyFacts, Layout, modules_with_weights
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap
from diffsynth_core.weights.lora_files import ADAPTER_CONFIG, read_lora_file
from diffsynth_core.weights.lora_formats import LORA_FORMATS
from diffsynth_core.weights.weight_writer import write_outputs

RANK = 2
HEAD = {"attention_head_dim": 8, "num_attention_heads": 1}
MODELS = {
    "qwen-image": ("QwenImageTransformer2DModel", {"num_layers": 1, "in_channels": 4, "joint_attention_dim": 6, "axes_dims_rope": (2, 2, 4), **HEAD}),
    "wan": ("WanTransformer3DModel", {"num_layers": 1, "in_channels": 2, "out_channels": 2, "text_dim": 6, "freq_dim": 4, "ffn_dim": 12, **HEAD}),
    "flux": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "in_channels": 4, "joint_attention_dim": 6, "pooled_projection_dim": 6, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4), **HEAD}),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1, "in_channels": 4, "joint_attention_dim": 6, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False, **HEAD}),
}  # fmt: skip
DOTTED = (
    *("", "transformer.", "diffusion_model.", "base_model.model.", "transformer.base_model.model.", "pipe.dit."),
    *("model.diffusion_model.", "diffusion_model.base_model.model."),
)
UNDERSCORED = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
ENDINGS = {
    "A, B": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "down, up": (".lora_down.weight", ".lora_up.weight"),
    "dotted down, up": (".lora.down.weight", ".lora.up.weight"),
}
TOLERANCE = 1e-6


def vocabularies(family: str) -> dict[str, KeyMap]:
    """Return sets of names that programs use for the modules of a family -> names in diffusers' module."""
    from diffsynth_core.models.flux import keys as flux
    from diffsynth_core.models.flux2 import keys as flux2
    from diffsynth_core.models.wan import keys as wan

    return {
        "qwen-image": {"diffusers": SAME_NAMES},
        "wan": {"original": wan.DIT, "diffusers": SAME_NAMES},
        "flux": {"documented": flux.DIT, "original": flux.DIT_ORIGINAL, "diffusers": SAME_NAMES},
        "flux2": {"original": flux2.DIT_ORIGINAL, "diffusers": SAME_NAMES},
    }[family]


@dataclass(frozen=True)
class Model:
    """A tiny transformer: weights by the names of diffusers, and their names in files."""

    facts: FamilyFacts
    layout: Layout
    weights: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by documented name."""
        return self.layout.public_shapes({name: tuple(tensor.shape) for name, tensor in self.weights.items()})

    def modules(self, names: KeyMap) -> dict[str, tuple[int, ...]]:
        """Return weight shapes of the modules that can have a LoRA, by the names of a vocabulary."""
        own = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        shapes = {name: names.fuse_shape(name, own) for name in names.to_sources(own)}
        return {module: shapes[f"{module}.weight"] for module in sorted(modules_with_weights(shapes))}


@cache
def model_of(family: str) -> Model:
    class_name, settings = MODELS[family]
    torch.manual_seed(0)
    state = getattr(diffusers, class_name)(**settings).state_dict()
    facts = FAMILIES[family]
    layouts = facts.component("dit").layouts
    layout = next(layout for layout in layouts if layout.names == SAME_NAMES and layout.signature <= state.keys())
    return Model(facts, layout, {name: torch.randn(tensor.shape) * 0.1 for name, tensor in state.items()})


@dataclass(frozen=True)
class Spelling:
    family: str
    names: str
    prefix: str
    ending: str

    def __str__(self) -> str:
        return f"{self.family}-{self.names}-{self.prefix or 'no prefix'}-{self.ending}"


SPELLINGS = [
    Spelling(family, names, prefix, ending)
    for family in MODELS
    for names in vocabularies(family)
    for prefix in (*DOTTED, *UNDERSCORED)
    for ending in ENDINGS
]


CONVERTED = SPELLINGS if os.environ.get("DIFFSYNTH_TEST_SPELLINGS") == "all" else SPELLINGS[::12]


def write(spelling: Spelling, path: Path, seed: int) -> dict[str, Tensor]:
    """Write a LoRA of every module, or every third, with scales as alpha keys or as peft's configuration.

    Returns s B A of each weight of diffusers' module, computed by hand.
    """
    model, names = model_of(spelling.family), vocabularies(spelling.family)[spelling.names]
    generator = torch.Generator().manual_seed(seed)
    tensors, changes = {}, {}
    by_peft = spelling.prefix.endswith("base_model.model.")
    down_end, up_end = ENDINGS[spelling.ending]
    modules = model.modules(names)
    some = list(modules) if spelling.prefix in ("diffusion_model.", "lora_unet_") else list(modules)[seed % 3 :: 3]
    for module in some:
        shape = modules[module]
        down = torch.randn(RANK, *shape[1:], generator=generator)
        up = torch.randn(shape[0], RANK, *[1] * len(shape[2:]), generator=generator)
        stem = spelling.prefix + (module.replace(".", "_") if spelling.prefix in UNDERSCORED else module)
        tensors |= {stem + down_end: down, stem + up_end: up}
        if not by_peft:
            tensors[f"{stem}.alpha"] = torch.tensor(0.5 * RANK)
        product = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(shape)
        changes |= names.split(f"{module}.weight", product)
    if by_peft:
        path.with_name(ADAPTER_CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 0.5 * RANK})
        )
    save_file(tensors, path)
    return changes


def merged(model: Model, path: Path) -> dict[str, Tensor]:
    """Return the weights of diffusers' module with a file merged in, as computed by a run and by `merge-lora`."""
    shapes = model.shapes
    modules = {name: shapes[f"{name}.weight"] for name in modules_with_weights(shapes)}
    naming = model.facts.component("dit").lora_naming
    file = read_lora_file(path, modules, naming, tensor_shapes=shapes)
    weights = {}
    with open_deltas(file, shapes, model.layout.public_keys) as changes:
        for name, weight in model.weights.items():
            change = changes.of(name)
            if change is not None:
                rows = weight.reshape(weight.shape[0], -1)
                weights[name] = merge_rows(rows, change, torch.float32, Workspace())[0].reshape(weight.shape)
    return weights


def largest_error(model: Model, path: Path, changes: Mapping[str, Tensor]) -> float:
    """Return the maximum error over all weights; parts of a fused module without a LoRA may come back as zeros."""
    found = merged(model, path)
    assert found.keys() >= changes.keys(), sorted(changes.keys() - found.keys())[:5]
    return max(
        float((weight - (model.weights[name] + changes.get(name, 0))).abs().max()) for name, weight in found.items()
    )


def convert(path: Path, target: str, output: Path, family: str) -> Path:
    plan = plan_conversion(path, target, output, path.parent, family=family)
    write_outputs(plan.outputs, plan.inputs, SilentReporter(), overwrite=True)
    return output


@pytest.fixture(scope="module")
def errors() -> Iterator[list[float]]:
    found: list[float] = []
    yield found
    print(f"\n{len(found)} merges, largest error {max(found):.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_every_spelling_changes_the_weights_by_s_b_a(tmp_path, errors, spelling):
    path = tmp_path / "lora.safetensors"
    changes = write(spelling, path, seed=1)
    errors.append(largest_error(model_of(spelling.family), path, changes))
    assert errors[-1] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("target", LORA_FORMATS)
@pytest.mark.parametrize("spelling", CONVERTED, ids=str)
def test_converted_into_each_dialect_and_back_it_is_the_same_change(tmp_path, errors, spelling, target):
    path = tmp_path / "lora.safetensors"
    changes, model = write(spelling, path, seed=2), model_of(spelling.family)
    there = convert(path, target, tmp_path / "there.safetensors", spelling.family)
    back = convert(there, "diffusers", tmp_path / "back.safetensors", spelling.family)
    for file in (there, back):
        errors.append(largest_error(model, file, changes))
        assert errors[-1] <= TOLERANCE
    with safe_open(there, framework="pt") as stream:
        assert all(key.startswith(LORA_FORMATS[target].prefixes[0]) for key in stream.keys())  # noqa: SIM118


# Whole differences


DIFFERENCES = {
    "weight": ".diff",
    "scale": ".diff",
    "bias": ".diff_b",
    "modulation": ".diff_m",
    "scale_shift_table": ".diff_m",
}


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "beside a LoRA"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize(("family", "names"), [(family, names) for family in MODELS for names in vocabularies(family)])
def test_whole_differences_are_added(tmp_path, errors, family, names, prefix, mixed):
    """As written by ModelTC/LightX2V: of norms, biases and modulations, and of matrices without a LoRA."""
    path, model, names_map = tmp_path / "lora.safetensors", model_of(family), vocabularies(family)[names]
    spelling = Spelling(family, names, prefix, "A, B")
    changes = write(spelling, path, seed=3) if mixed else {}
    tensors = load_file(path) if mixed else {}
    own = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
    for name in names_map.to_sources(own):
        stem, _, leaf = name.rpartition(".")
        if not stem or leaf not in DIFFERENCES or (mixed and stem in model.modules(names_map) and leaf == "weight"):
            continue
        difference = torch.randn(names_map.fuse_shape(name, own))
        written = stem.replace(".", "_") if prefix in UNDERSCORED else stem
        tensors[f"{prefix}{written}{DIFFERENCES[leaf]}"] = difference
        changes |= names_map.split(name, difference)
    if family == "wan":
        assert f"{prefix}blocks{'_' if prefix in UNDERSCORED else '.'}0.diff_m" in tensors
    save_file(tensors, path)
    errors.append(largest_error(model, path, changes))
    assert errors[-1] <= TOLERANCE


def test_a_difference_of_another_shape_is_refused(tmp_path):
    save_file({"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 7)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        DiffSynthError,
        match=r"`diffusion_model.blocks.0.diff_m` is \[1, 6, 7\], which does not match the tensor `blocks.0.modulation` \[1, 6, 8\]",
    ):
        merged(model_of("wan"), tmp_path / "lora.safetensors")


# Families


def open_source(path: Path, family: str | None = None):
    return open_lora(open_lora_file(path), family, None)


def some_modules(family: str, names: str, *parts: str) -> dict[str, tuple[int, ...]]:
    return {
        module: shape
        for module, shape in model_of(family).modules(vocabularies(family)[names]).items()
        if any(part in module for part in parts)
    }


def write_halves(path: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str = "lora_unet_") -> Path:
    tensors = {}
    for module, (rows, columns) in shapes.items():
        stem = prefix + (module.replace(".", "_") if prefix in UNDERSCORED else module)
        tensors |= {f"{stem}.lora_down.weight": torch.ones(1, columns), f"{stem}.lora_up.weight": torch.ones(rows, 1)}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["lora_unet_", "transformer.", ""])
def test_double_blocks_of_flux_in_the_names_of_diffusers_may_be_of_three_families(tmp_path, prefix):
    shapes = some_modules("flux", "diffusers", "attn.to_", "attn.add_")
    path = write_halves(
        tmp_path / "lora.safetensors", {n: s for n, s in shapes.items() if n.startswith("transformer")}, prefix
    )
    with pytest.raises(DiffSynthError, match="may be a LoRA of qwen-image or flux or flux2") as caught:
        open_source(path)
    assert caught.value.problems[0].hint == "pass `--family`, one of qwen-image, flux, flux2"
    assert open_source(path, "flux").facts.name == "flux"


@pytest.mark.parametrize(
    ("family", "names", "parts"),
    [
        ("flux", "diffusers", ("attn.to_q", "ff.net.0.proj")),
        ("flux", "original", ("img_attn.qkv", "img_mlp.0")),
        ("flux", "original", ("linear1",)),
        ("flux2", "original", ("img_attn.qkv", "img_mlp.2")),
        ("flux2", "original", ("linear2",)),
        ("flux2", "diffusers", ("attn.to_q", "linear_in")),
        ("qwen-image", "diffusers", ("attn.to_q", "img_mod.1")),
        ("wan", "original", ("self_attn.q",)),
        ("wan", "diffusers", ("attn1.to_q",)),
    ],
)
def test_names_and_sides_of_weights_decide(tmp_path, family, names, parts):
    """The original names of FLUX.1 and FLUX.2 are equal without modulations; their MLPs differ."""
    path = write_halves(tmp_path / "lora.safetensors", some_modules(family, names, *parts))
    assert open_source(path).facts.name == family


def test_the_number_of_a_block_decides(tmp_path):
    """Of the models with double blocks of these names, only Qwen-Image has more than 19."""
    path = write_halves(tmp_path / "lora.safetensors", {f"transformer_blocks.{n}.attn.to_q": (8, 8) for n in range(60)})
    assert open_source(path).facts.name == "qwen-image"
