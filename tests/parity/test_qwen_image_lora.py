"""LoRA files of a real run, loaded by diffusers: nothing missing or unexpected, and our output."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.adapters.lora import add_lora, load_lora
from tests.conftest import MODEL_ID
from tests.loras import RANK
from tests.parity.loras import adapter_modules, check_outputs, load_into


@pytest.fixture
def train_lora(cli, photographs, tmp_path):
    """Train a LoRA for four steps with a large learning rate; return its file."""

    def run(name: str, *more: object) -> Path:
        outcome = cli(
            "train", "--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--dataset_repeat", 1, "--num_epochs", 1,
            "--lora_rank", RANK, "--learning_rate", 0.05, "--dataset_base_path", photographs,
            "--output_path", tmp_path / name, *more,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return tmp_path / name / "epoch-0.safetensors"

    return run


@pytest.fixture
def lora_file(train_lora) -> Path:
    return train_lora("run")


def predict(transformer, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 24, 64, generator=generator),
            timestep=torch.tensor([0.6]),
            encoder_hidden_states=torch.randn(1, 9, transformer.config.joint_attention_dim, generator=generator),
            img_shapes=[[(1, 4, 6)]],
            return_dict=False,
        )[0]


@pytest.mark.parametrize("lora_format", ["diffsynth", "diffusers", "comfyui", "kohya"])
def test_every_dialect_loads_through_the_pipeline_and_computes_the_same(
    train_lora, lora_file, pipeline, complaints, tiny_models, lora_format
):
    """The same training, saved in any format: diffusers finds every module and gives our output."""
    other = lora_file if lora_format == "diffsynth" else train_lora(lora_format, "--lora_format", lora_format)
    modules = {key.rsplit(".lora_", 1)[0] for key in load_file(lora_file)}
    base = predict(pipeline.transformer)

    load_into(pipeline, other)
    assert complaints() == []
    assert adapter_modules(pipeline.transformer).keys() == modules
    loaded = predict(pipeline.transformer)

    transformer = _fresh_transformer(tiny_models)
    add_lora(transformer, sorted(modules), RANK, seed=0)
    assert load_lora(transformer, other) == len(modules)
    check_outputs(f"{lora_format}: {len(modules)} modules", loaded, predict(transformer), base)


def test_dead_modules_of_another_file_are_passed_over(lora_file, tiny_models, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(lora_file)
    down, up = (tensors[f"transformer_blocks.0.attn.to_add_out.lora_{half}.default.weight"] for half in "AB")
    tensors |= {
        f"transformer_blocks.1.attn.to_add_out.lora_{half}.default.weight": tensor
        for half, tensor in (("A", down.clone()), ("B", up.clone()))
    }
    save_file(tensors, tmp_path / "with_dead.safetensors")
    transformer = _fresh_transformer(tiny_models)
    alive = sorted({key.rsplit(".lora_", 1)[0] for key in load_file(lora_file)})
    add_lora(transformer, alive, RANK, seed=0)
    assert load_lora(transformer, tmp_path / "with_dead.safetensors") == len(alive)


def _fresh_transformer(tiny_models: Path):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_pretrained(
        tiny_models / MODEL_ID / "transformer", torch_dtype=torch.float32
    ).eval()
