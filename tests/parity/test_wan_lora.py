"""LoRA files of real Wan runs in every format, loaded by diffusers' pipelines: all modules, and our output."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from diffsynth_core.adapters.lora import lora_weights
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.wan import keys
from diffsynth_core.models.wan.spec import WAN
from tests.conftest import CAPTIONS, write_metadata
from tests.loras import RANK
from tests.parity.loras import adapter_modules, check_outputs, check_same_weights, load_into, train_file, with_lora
from tests.parity.wan_models import KINDS, Kind, find_files, load_files, load_pipeline

FORMATS = ("diffsynth", "diffusers", "comfyui", "kohya")
DOCUMENTED = ",".join(keys.LORA_TARGETS)
EXPERTS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
SECOND_EXPERT = f"{EXPERTS}:transformer_2/diffusion_pytorch_model*.safetensors"
PLACES_OF_A_BLOCK = [
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
]
MODULES = {f"blocks.{block}.{place}" for block in range(2) for place in PLACES_OF_A_BLOCK}
IMAGE_MODULES = {f"blocks.{block}.cross_attn.{part}_img" for block in range(2) for part in "kv"}


@dataclass(frozen=True)
class LoraRun:
    """What is trained, the target modules, and the pipeline component that it belongs to."""

    kind: Kind
    dit: str
    targets: str = DOCUMENTED
    modules: frozenset[str] = frozenset(MODULES)
    part: str = "transformer"


T2V, I2V = KINDS["T2V"], KINDS["I2V 2.1"]
RUNS = {
    "T2V": LoraRun(T2V, T2V.entries["dit"]),
    "T2V, second expert": LoraRun(T2V, SECOND_EXPERT, part="transformer_2"),
    "I2V 2.1": LoraRun(I2V, I2V.entries["dit"]),
    "I2V 2.1, k_img and v_img": LoraRun(
        I2V, I2V.entries["dit"], f"{DOCUMENTED},k_img,v_img", frozenset(MODULES | IMAGE_MODULES)
    ),
}


def own_names(modules: Collection[str]) -> set[str]:
    return {own for module in modules for own in keys.DIT.to_targets(module) or ()}


@pytest.fixture(scope="module")
def models(wan_models: Path) -> Path:
    """The models of all variants, and the second expert of one."""
    load_family("wan").write_tiny_weights(wan_models, "dit", *SECOND_EXPERT.split(":"))
    return wan_models


@pytest.fixture(scope="module")
def train_lora(models: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Train a LoRA on four images as clips of one frame with a large learning rate; return its file."""
    folder = tmp_path_factory.mktemp("runs")
    write_metadata(folder, [(f"{name}.png", caption) for name, caption in CAPTIONS.items()])
    metadata = folder / "metadata.csv"
    metadata.write_text(metadata.read_text(encoding="utf-8").replace("image", "video", 1), encoding="utf-8")

    @cache
    def train_one(name: str, lora_format: str) -> Path:
        run = RUNS[name]
        flags = {
            "model_id_with_origin_paths": ",".join((run.kind.entries | {"dit": run.dit}).values()),
            "extra_inputs": ",".join(run.kind.shown),
            "dataset_base_path": str(photographs),
            "dataset_metadata_path": str(metadata),
            "height": "32",
            "width": "32",
            "num_frames": "1",
            "lora_target_modules": run.targets,
            "learning_rate": "0.05",
        }
        return train_file(models, folder / name / lora_format, lora_format, flags)

    return train_one


def load_with_lora(base: Path, run: LoraRun, path: Path) -> Any:
    """Return the transformer of a run with a LoRA file, loaded by us."""
    transformer = load_files(find_files(base, "dit", run.dit))
    return with_lora(transformer, path, run.modules, WAN.component("dit").lora_naming, keys.DIT)


@torch.no_grad()
def predict(transformer: Any) -> Tensor:
    config, generator = transformer.config, torch.Generator().manual_seed(3)
    images = torch.randn(1, 257, config.image_dim, generator=generator) if config.image_dim else None
    return transformer(
        hidden_states=torch.randn(1, config.in_channels, 2, 4, 6, generator=generator),
        timestep=torch.tensor([600.0]),
        encoder_hidden_states=torch.randn(1, 9, config.text_dim, generator=generator),
        encoder_hidden_states_image=images,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("lora_format", FORMATS[1:])
def test_every_dialect_loads_through_the_pipeline_and_computes_the_same(
    train_lora, models, complaints, name, lora_format
):
    run = RUNS[name]
    pipeline = load_pipeline(models, run.kind)
    if run.part == "transformer_2":
        pipeline.register_modules(transformer_2=WanTransformer3DModel.from_pretrained(models / EXPERTS / run.part))
        load_into(pipeline, train_lora(name, lora_format), load_into_transformer_2=True)
        assert not adapter_modules(pipeline.transformer)
    else:
        load_into(pipeline, train_lora(name, lora_format))
    assert complaints() == []
    transformer = getattr(pipeline, run.part)
    carriers = adapter_modules(transformer)
    # diffusers puts a LoRA of zeros on the image half of an I2V model when the file has none for it.
    added = own_names(IMAGE_MODULES - run.modules) if run.kind.image_encoder else set()
    assert carriers.keys() == own_names(run.modules) | added
    assert all(not carriers[module].lora_B["trained"].weight.any() for module in added)

    loaded = predict(transformer)
    ours = predict(load_with_lora(models, run, train_lora(name, "diffsynth")))
    base = predict(load_files(find_files(models, "dit", run.dit)))
    check_outputs(f"{name}, {lora_format}: {len(carriers)} modules", loaded, ours, base)


def test_the_pipeline_does_not_know_the_documented_dialect(train_lora, models, complaints):
    """Why the other formats exist; and proof that warnings are captured."""
    pipeline = load_pipeline(models, T2V)
    load_into(pipeline, train_lora("T2V", "diffsynth"))
    assert not adapter_modules(pipeline.transformer)
    assert complaints()


@pytest.mark.parametrize("name", RUNS)
def test_documented_keys(train_lora, name):
    tensors = load_file(train_lora(name, "diffsynth"))
    assert tensors.keys() == {f"{module}.lora_{half}.default.weight" for module in RUNS[name].modules for half in "AB"}
    assert "blocks.1.self_attn.q.lora_A.default.weight" in tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("name", RUNS)
def test_all_dialects_read_back_to_the_same_weights(train_lora, models, name):
    run = RUNS[name]
    loaded = [load_with_lora(models, run, train_lora(name, lora_format)) for lora_format in FORMATS]
    check_same_weights([lora_weights(transformer, keys.DIT) for transformer in loaded], run.modules)


def test_kohya_stores_its_scale(train_lora):
    tensors = load_file(train_lora("T2V", "kohya"))
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    downs = [tensor for key, tensor in tensors.items() if key.endswith(".lora_down.weight")]
    assert len(alphas) == len(downs) == len(MODULES)
    assert all(alpha.item() == RANK == down.shape[0] for alpha, down in zip(alphas, downs, strict=True))
    assert "lora_unet_blocks_1_self_attn_q.lora_down.weight" in tensors
