"""LoRA files of real FLUX.1 runs, loaded by diffusers' `FluxPipeline`: all modules, and our output."""

from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth_core.adapters.lora import LoraWeights, lora_weights, name_lora
from diffsynth_core.models.flux import keys
from diffsynth_core.models.flux.components import build
from diffsynth_core.models.flux.spec import FLUX
from tests.conftest import CAPTIONS, write_metadata
from tests.loras import RANK
from tests.parity.flux_models import DIFFUSERS_PLACES, MODEL_ID, ORIGINAL_PLACES, find_files, load_files, load_pipeline
from tests.parity.loras import adapter_modules, check_outputs, check_same_weights, load_into, train_file, with_lora

FORMATS = ("diffsynth", "diffusers", "comfyui", "kohya")
NO_TEXT_ENCODER = "prefix='text_encoder'"
"""Part of `FluxPipeline`'s message about every file without a LoRA for CLIP."""
NAMING = FLUX.component("dit").lora_naming
PLACES = {"original": ORIGINAL_PLACES, "diffusers": DIFFUSERS_PLACES}
DOUBLE = (
    *("attn.a_to_qkv", "attn.b_to_qkv", "attn.a_to_out", "attn.b_to_out"),
    *("ff_a.0", "ff_a.2", "ff_b.0", "ff_b.2", "norm1_a.linear", "norm1_b.linear"),
)
SINGLE = ("to_qkv_mlp", "proj_out", "norm.linear")


def documented_modules(blocks: int) -> list[str]:
    """Return the documented target modules."""
    return [
        *(f"blocks.{block}.{place}" for block in range(blocks) for place in DOUBLE),
        *(f"single_blocks.{block}.{place}" for block in range(blocks) for place in SINGLE),
    ]


MODULES = documented_modules(2)


def own_names(modules: Collection[str]) -> set[str]:
    return {own for module in modules for own in keys.DIT.to_targets(module) or ()}


@pytest.fixture(scope="module")
def train_lora(
    flux_models: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Train a LoRA on four images with a large learning rate; return its file."""
    folder = tmp_path_factory.mktemp("runs")
    write_metadata(folder, [(f"{name}.png", caption) for name, caption in CAPTIONS.items()])

    @cache
    def train_one(layout: str, lora_format: str) -> Path:
        flags = {
            "model_id_with_origin_paths": ",".join(f"{MODEL_ID}:{place}" for place in PLACES[layout].values()),
            "dataset_base_path": str(photographs),
            "dataset_metadata_path": str(folder / "metadata.csv"),
            "height": "32",
            "width": "32",
            "lora_target_modules": ",".join(keys.LORA_TARGETS),
            "learning_rate": "0.02",
        }
        return train_file(flux_models, folder / layout / lora_format, lora_format, flags)

    return train_one


def load_transformer(base: Path, layout: str = "original") -> Any:
    return load_files(find_files(base, "dit", f"{MODEL_ID}:{PLACES[layout]['dit']}"))


@torch.no_grad()
def predict(transformer: Any) -> Tensor:
    config, generator = transformer.config, torch.Generator().manual_seed(3)
    ids = torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.arange(12) % 4], dim=1)
    return transformer(
        hidden_states=torch.randn(1, 12, config.in_channels, generator=generator),
        timestep=torch.tensor([0.6]),
        guidance=torch.ones(1),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
        encoder_hidden_states=torch.randn(1, 9, config.joint_attention_dim, generator=generator),
        txt_ids=torch.zeros(9, 3),
        img_ids=ids,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("layout", PLACES)
def test_the_diffusers_dialect_loads_through_the_pipeline_and_computes_the_same(
    train_lora, flux_models, complaints, layout
):
    pipeline = load_pipeline(flux_models)
    base = predict(pipeline.transformer)
    load_into(pipeline, train_lora(layout, "diffusers"))
    assert [remark for remark in complaints() if NO_TEXT_ENCODER not in remark] == []
    carriers = adapter_modules(pipeline.transformer)
    assert carriers.keys() == own_names(MODULES)
    loaded = predict(pipeline.transformer)
    ours = predict(
        with_lora(load_transformer(flux_models, layout), train_lora(layout, "diffsynth"), MODULES, NAMING, keys.DIT)
    )
    check_outputs(f"{layout}: {len(carriers)} modules", loaded, ours, base)


@torch.no_grad()
def test_kohya_loads_through_the_pipeline_at_the_published_width(tmp_path, complaints):
    """diffusers assumes a width of 3072; one block of each kind is enough: 532 M parameters, 2.1 GB."""
    config = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True,
    }  # fmt: skip
    with torch.device("meta"):
        transformer: Any = build("dit", config).eval()
    transformer.to_empty(device="cpu")
    fill_quickly(transformer)
    modules = documented_modules(1)
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for module in modules:
        rows, columns = keys.DIT.fuse_shape(f"{module}.weight", shapes)
        down = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        weights[module] = LoraWeights(down, torch.randn(rows, RANK, generator=generator))
    tensors = name_lora(weights, "kohya", NAMING)
    path = tmp_path / "kohya.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    base = predict(transformer)
    pipeline = FluxPipeline(None, None, None, None, None, None, transformer)
    load_into(pipeline, path)
    assert [remark for remark in complaints() if NO_TEXT_ENCODER not in remark] == []
    carriers = adapter_modules(transformer)
    assert carriers.keys() == own_names(modules)
    loaded = predict(transformer)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(transformer), base)
    ours = predict(with_lora(transformer, path, modules, NAMING, keys.DIT))
    check_outputs(f"kohya: {len(carriers)} modules", loaded, ours, base, scale=float(loaded.abs().max()))


def fill_quickly(module: torch.nn.Module) -> None:
    """Fill kernels by repeating one row of random numbers: drawing all of them would take most of the test."""
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])
        parameter.data.mul_((3 * parameter.shape[1]) ** -0.5)


@pytest.mark.parametrize("lora_format", ["diffsynth", "comfyui"])
def test_the_pipeline_does_not_know_the_fused_modules(train_lora, flux_models, complaints, lora_format):
    """It finds none in formats with the documented or original names, and only logs a warning."""
    pipeline = load_pipeline(flux_models)
    load_into(pipeline, train_lora("original", lora_format))
    assert not adapter_modules(pipeline.transformer)
    assert any("prefix='transformer'" in remark for remark in complaints())


EXAMPLES = {
    "diffsynth": ("blocks.1.attn.a_to_qkv.lora_A.default.weight", "single_blocks.0.to_qkv_mlp.lora_B.default.weight"),
    "diffusers": (
        "transformer.transformer_blocks.1.attn.add_k_proj.lora_A.weight",
        "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight",
    ),
    "comfyui": (
        "diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight",
        "diffusion_model.single_blocks.0.linear1.lora_B.weight",
    ),
    "kohya": (
        "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight",
        "lora_unet_single_blocks_0_linear1.lora_up.weight",
    ),
}


@pytest.mark.parametrize("lora_format", FORMATS)
def test_keys_of_each_dialect(train_lora, lora_format):
    tensors = load_file(train_lora("original", lora_format))
    parts = len(own_names(MODULES)) if lora_format == "diffusers" else len(MODULES)
    assert len(tensors) == parts * (3 if lora_format == "kohya" else 2)
    assert all(tensors[name].dtype == torch.float32 for name in EXAMPLES[lora_format])
    if lora_format == "diffsynth":
        assert tensors.keys() == {f"{module}.lora_{half}.default.weight" for module in MODULES for half in "AB"}
    if lora_format == "kohya":
        assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {RANK}


def test_both_layouts_train_the_same(train_lora):
    """The parts of a fused module get the LoRA of the whole, whichever files the base comes from."""
    first, second = (load_file(train_lora(layout, "diffsynth")) for layout in PLACES)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.any() for tensor in first.values()), "every module has learned"


def test_all_dialects_read_back_to_the_same_weights(train_lora, flux_models):
    loaded = [
        with_lora(load_transformer(flux_models), train_lora("original", lora_format), MODULES, NAMING, keys.DIT)
        for lora_format in FORMATS
    ]
    check_same_weights([lora_weights(transformer, keys.DIT) for transformer in loaded], MODULES)


@torch.no_grad()
def test_the_base_is_what_diffusers_reads(flux_models):
    """Both start from the same weights; otherwise equal outputs would prove little."""
    theirs = FluxTransformer2DModel.from_pretrained(flux_models / MODEL_ID / "transformer", torch_dtype=torch.float32)
    assert torch.equal(predict(theirs), predict(load_transformer(flux_models)))
