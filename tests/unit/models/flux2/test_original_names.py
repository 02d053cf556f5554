"""The original names of FLUX.2's transformer, against the converter of diffusers."""

import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from diffsynth_core.models.flux2.keys import DIT_MODULES, DIT_ORIGINAL


def tensors_of(tiny_families) -> dict[str, torch.Tensor]:
    """Return the tensors of the tiny transformer with distinct values, so that permuted rows are noticed."""
    files = sorted(
        (tiny_families("flux2").base / "black-forest-labs/FLUX.2-klein-4B/transformer").glob("*.safetensors")
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for file in files for name, tensor in load_file(file).items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_diffusers_reads_the_original_names_back(cli, tiny_families):
    """Every tensor has an original key; diffusers' converter accepts the output of the command."""
    tensors = tensors_of(tiny_families)
    save_file({f"pipe.dit.{name}": tensor for name, tensor in tensors.items()}, "epoch-0.safetensors")
    outcome = cli("split-ckpt", "epoch-0.safetensors", "--output_path", "parts", "--layout", "original")
    assert outcome.code == 0, outcome.err
    original = load_file("parts/dit.safetensors")
    assert not original.keys() & tensors.keys()
    read = convert_flux2_transformer_checkpoint_to_diffusers(original)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_norms_carry_no_lora():
    assert not [name for name in DIT_MODULES if "norm_q" in name or "norm_k" in name]
    assert (
        DIT_ORIGINAL.to_source("transformer_blocks.0.attn.norm_q.weight")
        == "double_blocks.0.img_attn.norm.query_norm.scale"
    )
