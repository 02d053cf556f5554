"""Tiny random FLUX.2 components, with the classes, file layout and key names of the published ones."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.flux2.components import ROPE_THETA, build, rope_axes
from diffsynth_core.models.flux2.keys import TEXT_LAYERS
from diffsynth_core.models.tiny import (
    GAINS,
    diffusers_config,
    fill,
    published_name,
    write_json,
    write_weights,
)
from diffsynth_core.models.tiny_tokenizers import tiny_vocabulary, write_tokenizer

TEMPLATE_WORDS = ("user", "assistant")
"""Words of the chat template that are one token each."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Special tokens, numbered after the vocabulary."""
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""
"""A template with the output of Qwen3's own for one message, with and without thinking."""
LATENT_SPREAD = 0.6
"""Standard deviation of the random VAE's unnormalized latents of photographs."""


@dataclass(frozen=True)
class TinyTransformer:
    """How the transformers of FLUX.2 differ.

    The number of single blocks is the published one, because recipes list them one by one.
    """

    single_blocks: int = 20
    guidance: bool = False
    tied_embedding: bool = True
    """Whether the output head of its text encoder is tied to the embedding."""


TRANSFORMERS = (
    ("*9B*", TinyTransformer(24, tied_embedding=False)),
    ("*-dev*", TinyTransformer(48, guidance=True)),
    ("*", TinyTransformer()),
)
"""(pattern of the hub repository, transformer), first match wins."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the random components; widths in channels."""

    blocks: int = 2
    heads: int = 2
    head_size: int = 16
    text_width: int = 32
    text_layers: int = max(TEXT_LAYERS) + 1
    vae_width: int = 16


def write_tiny_weights(base: Path, component: str, model_id: str, pattern: str, sizes: TinySizes = TinySizes()) -> None:
    """Write one component below `base`/`model_id` to a path that matches `pattern`; a text encoder includes its
    tokenizer.
    """
    path = PurePosixPath(pattern)
    folder = base / model_id / path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if component == "text_encoder":
        write_tokenizer(folder.parent / "tokenizer", TEMPLATE_WORDS, SPECIAL_TOKENS)
        (folder.parent / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    kind = next(kind for name, kind in TRANSFORMERS if fnmatch(model_id, name))
    config = {"dit": _transformer, "text_encoder": _text_encoder, "vae": _vae}[component](kind, sizes)
    module = build(component, config).eval()
    fill(module, GAINS[component], seed=0)
    if component == "vae":
        _set_statistics(module)
    tensors = {name: _stored(name, tensor) for name, tensor in module.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    _write_config(folder / "config.json", component, module, config)
    write_weights(folder, published_name(component, path.name), tensors)


def _transformer(kind: TinyTransformer, sizes: TinySizes) -> dict[str, Any]:
    return {
        "num_layers": sizes.blocks,
        "num_single_layers": kind.single_blocks,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_size,
        "joint_attention_dim": len(TEXT_LAYERS) * sizes.text_width,
        "axes_dims_rope": rope_axes(sizes.head_size),
        "guidance_embeds": kind.guidance,
    }


def _text_encoder(kind: TinyTransformer, sizes: TinySizes) -> dict[str, Any]:
    words = len(tiny_vocabulary(TEMPLATE_WORDS)[0])
    return {
        "vocab_size": words + len(SPECIAL_TOKENS),
        "bos_token_id": words + SPECIAL_TOKENS.index("<|endoftext|>"),
        "eos_token_id": words + SPECIAL_TOKENS.index("<|im_end|>"),
        "hidden_size": sizes.text_width,
        "intermediate_size": 2 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": sizes.text_width // 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": kind.tied_embedding,
    }


def _vae(kind: TinyTransformer, sizes: TinySizes) -> dict[str, Any]:
    width = sizes.vae_width
    return {"block_out_channels": [width, width, 2 * width, 2 * width], "norm_num_groups": 4, "layers_per_block": 1}


def _set_statistics(vae: Any) -> None:
    """Set running statistics that differ per channel and give latents of photographs a spread near 1."""
    generator = torch.Generator().manual_seed(1)
    statistics = vae.bn
    statistics.running_mean.normal_(std=0.1 * LATENT_SPREAD, generator=generator)
    statistics.running_var.uniform_(0.8, 1.2, generator=generator).mul_(LATENT_SPREAD**2)


def _stored(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype of published files, in which running statistics are not converted."""
    return tensor.detach() if name.startswith("bn.") else tensor.detach().to(torch.bfloat16)


def _write_config(path: Path, component: str, module: Any, config: dict[str, Any]) -> None:
    if component == "text_encoder":
        content = {"architectures": [type(module).__name__], "model_type": "qwen3", **config}
    else:
        content = diffusers_config(module)
    write_json(path, content)
