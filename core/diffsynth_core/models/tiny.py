"""Initialization and files of tiny random components, for all families."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GAINS = {
    "dit": 3**-0.5,
    "controlnet": 3**-0.5,
    "text_encoder": 1.0,
    "text_encoder_1": 1.0,
    "text_encoder_2": 1.0,
    "vae": 1.0,
    "image_encoder": 1.0,
}
"""Component -> standard deviation of kernels x sqrt(fan-in).

PyTorch's own, 3^-1/2, makes the predictions of a random transformer smaller than its target, so that the first loss is
near that of predicting 0; the encoders preserve the scale of signals.
"""

FILE_STEMS = {
    "dit": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_1": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
}
"""Component -> stem of published files, for patterns such as `*.safetensors`."""

EMBEDDINGS = ("embed_tokens.weight", "shared.weight", "token_embedding.weight")
"""Suffixes of lookup tables."""


def fill(module: nn.Module, gain: float, seed: int) -> None:
    """Initialize the parameters deterministically, such that different inputs give different outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        _fill(name, parameter, gain, generator)


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter, gain: float, generator: torch.Generator) -> None:
    """Set biases to 0 and scale kernels by their fan-in (of one frame: a causal kernel sees one frame of an image).

    With PyTorch's own initialization a VAE maps all photographs to nearly the same latents.
    """
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.ndim == 1 or name.endswith("gamma"):
        parameter.fill_(1.0)
    elif name.endswith(EMBEDDINGS):
        parameter.normal_(generator=generator)
    else:
        fan_in = parameter.shape[1] * math.prod(parameter.shape[3:] if parameter.ndim == 5 else parameter.shape[2:])
        parameter.normal_(std=gain * fan_in**-0.5, generator=generator)


def published_name(component: str, name: str) -> str:
    """Return the file name in a pattern, with the published stem if the pattern starts with `*`."""
    return FILE_STEMS[component] + name if name.startswith("*") else name


def write_weights(folder: Path, pattern: str, tensors: dict[str, Tensor]) -> None:
    """Write one file, or two shards and an index if the pattern has a `*`; pickled if it ends with `.pth`."""
    from safetensors.torch import save_file

    names = list(tensors)
    if pattern.endswith(".pth"):
        torch.save(tensors, folder / pattern)
        return
    if "*" not in pattern:
        save_file(tensors, folder / pattern, metadata={"format": "pt"})
        return
    stem, _, ending = pattern.partition("*")
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file_name = f"{stem}-{number:05d}-of-00002{ending}"
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{stem}{ending}.index.json", index)


def tiny_t5(width: int, vocabulary: int) -> dict[str, Any]:
    """Return the options of a tiny T5 or UMT5 encoder with `width` channels."""
    heads = 4
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": width // heads,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
    }


def diffusers_config(module: Any) -> dict[str, object]:
    """Return the config.json of a diffusers module, without private keys: `_use_default_values` differs between
    processes.
    """
    config = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return {"_class_name": type(module).__name__, **config}


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as on model hubs, indented by two spaces."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
