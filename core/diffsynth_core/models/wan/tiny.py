"""Tiny random Wan components, with the classes, file layouts and key names of the published ones."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.tiny import GAINS, diffusers_config, fill, tiny_t5, write_json, write_weights
from diffsynth_core.models.tiny_tokenizers import unigram_vocabulary, write_unigram_tokenizer
from diffsynth_core.models.wan import keys
from diffsynth_core.models.wan.components import IMAGE_ENCODER_HEADS, LATENTS_MEAN_48, LATENTS_STD_48, build
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap

DIFFUSERS_FOLDERS = ("transformer", "transformer_2", "text_encoder", "vae", "image_encoder")
"""Folders whose files have the diffusers layout; all others have Wan's own."""
IMAGE_TOKENS = 257
"""Tokens of CLIP for an image: 224 x 224 pixels in patches of 14, and the class token."""

MAX_BIAS = 0.05
"""Largest bias of the random VAE's first convolution."""


@dataclass(frozen=True)
class TinyTransformer:
    """How the transformers of Wan differ; `type_name` is `model_type` in Wan's own config.json."""

    type_name: str
    in_channels: int
    out_channels: int = 16
    images: int = 0
    """Number of images that it reads through CLIP."""


TRANSFORMERS = (
    ("*Wan2.2-TI2V*", TinyTransformer("ti2v", 48, 48)),
    ("*Wan2.1-FLF2V*", TinyTransformer("flf2v", 36, images=2)),
    ("*Wan2.1-I2V*", TinyTransformer("i2v", 36, images=1)),
    ("*Wan2.1-Fun*InP", TinyTransformer("i2v", 36, images=1)),
    ("*Wan2.2-I2V*", TinyTransformer("i2v", 36)),
    ("*Wan2.2-Fun*InP", TinyTransformer("i2v", 36)),
    ("*", TinyTransformer("t2v", 16)),
)
"""(pattern of the hub repository, transformer), first match wins."""

LATENT_SPREAD = {16: 0.75, 48: 0.6}
"""Number of channels -> standard deviation of the random VAE's unnormalized latents, between that of photographs and
that of clips.
"""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the random components; widths in channels."""

    blocks: int = 2
    heads: int = 2
    head_size: int = 16
    text_width: int = 64
    vae_width: int = 8
    image_width: int = 32
    image_layers: int = 3


def write_tiny_weights(base: Path, component: str, model_id: str, pattern: str, sizes: TinySizes = TinySizes()) -> None:
    """Write one component below `base`/`model_id` to a path that matches `pattern`, which selects the layout.

    A text encoder includes its tokenizer, an image encoder of the diffusers layout its image processor. Transformers
    of different repositories and folders have different weights, as two experts do.
    """
    path = PurePosixPath(pattern)
    folder = base / model_id / path.parent
    folder.mkdir(parents=True, exist_ok=True)
    diffusers = path.parent.name in DIFFUSERS_FOLDERS
    config = _config(component, model_id, path, sizes)
    module = build(component, config).eval()
    fill(module, GAINS[component], seed=zlib.crc32(f"{model_id}/{path.parent}".encode()) if component == "dit" else 0)
    if component == "vae":
        _spread_latents(module)
        _keep_gray_nonzero(module)
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in module.state_dict().items()}
    tensors.pop("encoder.embed_tokens.weight", None)  # tied, and absent from published files
    if component == "text_encoder":
        tokenizer = folder.parent / "tokenizer" if diffusers else folder / "google" / "umt5-xxl"
        write_unigram_tokenizer(tokenizer, byte_fallback=True)
    if diffusers:
        _write_companions(folder, component, module, config)
    elif component == "dit":
        write_json(folder / "config.json", _original_config(config, _kind(model_id)))
    write_weights(folder, path.name, _in_layout(_key_map(component, diffusers, config), tensors))


def _config(component: str, model_id: str, path: PurePosixPath, sizes: TinySizes) -> dict[str, Any]:
    if component == "dit":
        return _transformer(_kind(model_id), sizes)
    if component == "vae":
        newer = "Wan2.2_VAE" in path.name or "TI2V-5B" in model_id
        return _vae_2_2(sizes) if newer else {"base_dim": sizes.vae_width}
    return {"text_encoder": _text_encoder, "image_encoder": _image_encoder}[component](sizes)


def _kind(model_id: str) -> TinyTransformer:
    return next(kind for pattern, kind in TRANSFORMERS if fnmatch(model_id, pattern))


def _transformer(kind: TinyTransformer, sizes: TinySizes) -> dict[str, Any]:
    width = sizes.heads * sizes.head_size
    config = {
        "num_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_size,
        "in_channels": kind.in_channels,
        "out_channels": kind.out_channels,
        "text_dim": sizes.text_width,
        "ffn_dim": 4 * width,
    }
    if kind.images:
        config |= {"image_dim": sizes.image_width, "added_kv_proj_dim": width}
    if kind.images > 1:
        config["pos_embed_seq_len"] = kind.images * IMAGE_TOKENS
    return config


def _text_encoder(sizes: TinySizes) -> dict[str, Any]:
    return tiny_t5(sizes.text_width, len(unigram_vocabulary(byte_fallback=True)))


def _vae_2_2(sizes: TinySizes) -> dict[str, Any]:
    return {
        "base_dim": sizes.vae_width,
        "decoder_base_dim": 2 * sizes.vae_width,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": LATENTS_MEAN_48,
        "latents_std": LATENTS_STD_48,
    }


def _image_encoder(sizes: TinySizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.image_width,
        "intermediate_size": 2 * sizes.image_width,
        "num_hidden_layers": sizes.image_layers,
        "num_attention_heads": math.gcd(sizes.image_width, IMAGE_ENCODER_HEADS),
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    }


@torch.no_grad()
def _keep_gray_nonzero(module: Any) -> None:
    """Set biases of the first convolution, without which gray frames would become zeros.

    The frames after a conditioning frame are gray (0), and norms divide by the magnitude of their input.
    """
    bias = module.encoder.conv_in.bias
    bias.copy_(torch.linspace(-MAX_BIAS, MAX_BIAS, len(bias)))


@torch.no_grad()
def _spread_latents(module: Any) -> None:
    """Give latents the published mean and spread, so that they are normalized to 0 and 1: files in Wan's own layout do
    not state them.
    """
    mean = torch.tensor(module.config.latents_mean)
    spread = torch.tensor(module.config.latents_std) / LATENT_SPREAD[len(mean)]
    module.quant_conv.weight[: len(mean)] *= spread.view(-1, 1, 1, 1, 1)
    module.quant_conv.bias[: len(mean)] = mean


def _key_map(component: str, diffusers: bool, config: Mapping[str, Any]) -> KeyMap:
    if diffusers:
        return keys.IMAGE_ENCODER_DIFFUSERS if component == "image_encoder" else SAME_NAMES
    vae = keys.VAE_2_2 if config.get("is_residual") else keys.VAE_2_1
    return {
        "dit": keys.DIT,
        "text_encoder": keys.TEXT_ENCODER,
        "vae": vae,
        "image_encoder": keys.IMAGE_ENCODER,
    }[component]


def _in_layout(table: KeyMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module under the keys of a layout, with the unused parts of CLIP in Wan's own."""
    found = [(name, table.to_source(name)) for name in tensors]
    renamed = {key: table.fuse(key, tensors) for key in dict.fromkeys(key for _, key in found if key)}
    if table is keys.IMAGE_ENCODER:
        width = tensors["post_layernorm.weight"].numel()
        renamed["visual.head"] = torch.zeros(width, width, dtype=torch.bfloat16)
        renamed["textual.head.0.weight"] = torch.zeros(width, width, dtype=torch.bfloat16)
        renamed["log_scale"] = torch.zeros((), dtype=torch.bfloat16)
    return renamed


def _original_config(config: Mapping[str, Any], kind: TinyTransformer) -> dict[str, Any]:
    """Return Wan's own config.json of a transformer."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": 1e-06,
        "ffn_dim": config["ffn_dim"],
        "freq_dim": 256,
        "in_dim": config["in_channels"],
        "model_type": kind.type_name,
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }


def _write_companions(folder: Path, component: str, module: Any, config: Mapping[str, Any]) -> None:
    """Write the config.json of a diffusers folder, and the image processor of CLIP."""
    if component == "image_encoder":
        content = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **config}
        (folder.parent / "image_processor").mkdir(exist_ok=True)
        write_json(folder.parent / "image_processor" / "preprocessor_config.json", IMAGE_PROCESSOR)
    elif component == "text_encoder":
        content = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "tie_word_embeddings": False, **config}
    else:
        content = diffusers_config(module)
    write_json(folder / "config.json", content)


IMAGE_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}
"""The preprocessor_config.json of CLIP ViT-H."""
