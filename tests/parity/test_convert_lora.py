"""LoRA files converted between formats: every weight change is preserved, and diffusers finds all modules."""

from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, FluxTransformer2DModel, QwenImagePipeline, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth_core.adapters.deltas import WeightDelta, read_delta
from diffsynth_core.conversion.convert import plan_conversion
from diffsynth_core.models.loading import module_shapes
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import modules_with_weights
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.lora_files import read_lora_file
from diffsynth_core.weights.lora_formats import LORA_FORMATS, LoraNaming, keys_of_part
from diffsynth_core.weights.weight_writer import write_outputs
from tests.loras import RECIPES, TinyFamily
from tests.parity.models import load_files

Shapes = Mapping[str, tuple[int, ...]]
RANK = 4
CONVERSIONS = list(permutations(LORA_FORMATS, 2))
ALPHAS = {None: 0.0, RANK / 2: 0.0, 0.3: 1e-6}
"""Stored alpha -> tolerance of a change, relative to its largest value."""


def naming_of(family: str) -> LoraNaming:
    return FAMILIES[family].component("dit").lora_naming


def all_modules(tiny: TinyFamily) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of all modules of the tiny transformer, by documented name."""
    files = tiny.plan(output_path="unused").model.components["dit"]
    shapes = files.layout.public_shapes(module_shapes(files))
    return {name: shapes[f"{name}.weight"] for name in sorted(modules_with_weights(shapes))}


def shapes_in(lora_format: str, shapes: Shapes, naming: LoraNaming) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of the same modules in a format, by its names."""
    if lora_format in naming.fused:
        fused = naming.fused[lora_format]
        return {name: fused.fuse_shape(name, shapes) for name in fused.to_sources(shapes)}
    names = naming.vocabulary(lora_format).names
    found = {}
    for module, shape in shapes.items():
        found |= {
            part.removesuffix(".weight"): cut for part, cut in names.split_shape(f"{module}.weight", shape).items()
        }
    return found


def write_source(
    path: Path, lora_format: str, shapes: Shapes, naming: LoraNaming, alpha: float | None = None, dtype=torch.float32
) -> Path:
    """Write a LoRA file of small integers, whose products are exact, with a lora_A for each module of the format."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    tensors = {}
    for module, shape in shapes_in(lora_format, shapes, naming).items():
        keys = keys_of_part(module, lora_format)
        tensors[keys.A] = draw(RANK, *shape[1:])
        tensors[keys.B] = draw(shape[0], RANK, *[1] * len(shape[2:]))
        if alpha is not None and keys.alpha:
            tensors[keys.alpha] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def convert(path: Path, target: str, family: str, **choices: Any) -> Path:
    """Return the same LoRA in another format."""
    output = path.with_name(f"{path.stem}-{target}.safetensors")
    plan = plan_conversion(path, target, output, path.parent, family=family, **choices)
    write_outputs(plan.outputs, plan.inputs, SilentReporter())
    return output


def changes(path: Path, shapes: Shapes, naming: LoraNaming) -> dict[str, Tensor]:
    """Return the change of each documented module's weight, as merging reads it."""
    from safetensors import safe_open

    file = read_lora_file(path, shapes, naming)
    with safe_open(path, framework="pt") as stream:
        factors = {module: read_delta(file, stream, f"{module}.weight", shapes[module]) for module in file.modules}
    return {module: _product(found, shapes[module]) for module, found in factors.items()}


def _product(factors: WeightDelta, shape: tuple[int, ...]) -> Tensor:
    return (factors.B @ factors.A).reshape(shape)


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], off: float) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    for module, change in expected.items():
        assert change.any(), module
        difference = float((found[module] - change).abs().max())
        assert difference <= off * float(change.abs().max()), (module, difference)


@pytest.mark.parametrize(
    ("source", "target", "alpha"),
    [
        (*pair, alpha)
        for pair in CONVERSIONS
        for alpha in (ALPHAS if LORA_FORMATS[pair[0]].alpha != "never" else [None])
    ],
)
@pytest.mark.parametrize("family", RECIPES)
def test_there_and_back_every_change_of_weights_is_the_same(
    tiny_families: Callable[[str], TinyFamily], tmp_path, family, source, target, alpha
):
    tiny, naming = tiny_families(family), naming_of(family)
    shapes = all_modules(tiny)
    path = write_source(tmp_path / "lora.safetensors", source, shapes, naming, alpha)
    there = convert(path, target, family)
    back = convert(there, source, family)
    expected = changes(path, shapes, naming)
    assert expected.keys() == shapes.keys()
    for file in (there, back):
        check_same(changes(file, shapes, naming), expected, ALPHAS[alpha])
    stored = {keys.alpha for keys in (keys_of_part(name, target) for name in shapes_in(target, shapes, naming))} - {
        None
    }
    kept = LORA_FORMATS[target].alpha == "always" or (LORA_FORMATS[target].alpha == "kept" and alpha is not None)
    assert {key for key in load_file(there) if key.endswith(".alpha")} == (stored if kept else set())


PIPELINES = {
    "qwen-image": QwenImagePipeline, "wan": WanPipeline, "flux": FluxPipeline, "flux2": Flux2KleinPipeline,
}  # fmt: skip
READ_BY_DIFFUSERS = [
    *((family, "diffusers") for family in PIPELINES),
    *((family, lora_format) for family in ("qwen-image", "wan", "flux2") for lora_format in ("comfyui", "kohya")),
]


def targets(tiny: TinyFamily) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of the modules that recipes train, by documented name."""
    return tiny.module_shapes()


def own_changes(tiny: TinyFamily, documented: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the changes by module of diffusers."""
    names = tiny.plan(output_path="unused").model.components["dit"].layout.public_keys
    return {
        own.removesuffix(".weight"): change
        for module, whole in documented.items()
        for own, change in names.split(f"{module}.weight", whole).items()
    }


@pytest.mark.parametrize(("family", "target"), READ_BY_DIFFUSERS)
def test_diffusers_loads_every_module_with_its_change(
    tiny_families: Callable[[str], TinyFamily], tmp_path, complaints, family, target
):
    """Into a model: no module is missing or unexpected, and none has another scale."""
    tiny, naming = tiny_families(family), naming_of(family)
    source = "comfyui" if target == "diffusers" else "diffsynth"
    path = write_source(tmp_path / "lora.safetensors", source, targets(tiny), naming)
    state = PIPELINES[family].lora_state_dict(str(convert(path, target, family)))
    model = load_files(family, tiny.plan(output_path="unused").model.components["dit"])
    model.load_lora_adapter(state, prefix="transformer", adapter_name="converted")
    loaded = {
        name: module.get_delta_weight("converted").detach()
        for name, module in model.named_modules()
        if len(getattr(module, "lora_A", ()))
    }
    check_same(loaded, own_changes(tiny, changes(path, targets(tiny), naming)), 0.0)
    assert complaints() == []


LOADED_BY_DIFFUSERS = {
    "qwen-image": {"diffsynth", "diffusers", "comfyui", "kohya"},
    "wan": {"diffusers", "comfyui", "kohya"},
    "flux": {"diffusers", "kohya"},
    "flux2": {"diffusers", "comfyui", "kohya"},
}
"""What the README states about diffusers 0.42.1."""


@pytest.mark.parametrize("lora_format", LORA_FORMATS)
@pytest.mark.parametrize("family", PIPELINES)
def test_what_loads_where(tiny_families: Callable[[str], TinyFamily], tmp_path, family, lora_format):
    """All modules, or none with a warning only. FLUX.1 in kohya's format requires the published widths: below."""
    if (family, lora_format) == ("flux", "kohya"):
        return
    tiny, naming = tiny_families(family), naming_of(family)
    shapes = targets(tiny)
    source = write_source(tmp_path / "source.safetensors", "diffusers", shapes, naming)
    path = source if lora_format == "diffusers" else convert(source, lora_format, family)
    model = load_files(family, tiny.plan(output_path="unused").model.components["dit"])
    try:
        model.load_lora_adapter(PIPELINES[family].lora_state_dict(str(path)), prefix="transformer", adapter_name="a")
    except (ValueError, KeyError, RuntimeError) as error:
        print(family, lora_format, error)
    loaded = sum(bool(len(getattr(module, "lora_A", ()))) for module in model.modules())
    everything = len(shapes_in("diffusers", shapes, naming))
    print(f"{family} {lora_format}: {loaded} of {everything} modules")
    assert loaded == (everything if lora_format in LOADED_BY_DIFFUSERS[family] else 0)


def test_kohya_s_names_of_flux_reach_every_module_of_diffusers(tmp_path):
    """diffusers hard-codes the published widths; every row of every change is compared on one input."""
    naming, width = naming_of("flux"), 3072
    rows = {"qkv": 3 * width, "to_qkv_mlp": 7 * width, "linear": 6 * width, "ff_a.0": 4 * width, "ff_b.0": 4 * width}
    columns = {"ff_a.2": 4 * width, "ff_b.2": 4 * width, "proj_out": 5 * width}
    shapes = {
        module: (
            3 * width
            if module == "single_blocks.0.norm.linear"
            else next((n for end, n in rows.items() if module.endswith(end)), width),
            next((n for end, n in columns.items() if module.endswith(end)), width),
        )
        for module in naming.modules_met(["blocks.0"])
        if "blocks." in module
    }
    path = write_source(tmp_path / "lora.safetensors", "diffusers", shapes, naming)
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    blocks = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "blocks." in name
    }
    state = FluxPipeline.lora_state_dict(str(convert(path, "kohya", "flux")))
    assert {key.removeprefix("transformer.").partition(".lora_")[0] for key in state} == blocks
    given = load_file(path)
    for module in blocks:
        inputs = torch.ones(given[f"transformer.{module}.lora_A.weight"].shape[1])
        moved = [
            tensors[f"transformer.{module}.lora_B.weight"] @ (tensors[f"transformer.{module}.lora_A.weight"] @ inputs)
            for tensors in (given, state)
        ]
        assert moved[0].any() and torch.equal(*moved), module
