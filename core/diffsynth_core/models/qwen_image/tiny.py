"""Tiny random Qwen-Image components, with the classes, file layout and key names of the published ones."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from diffsynth_core.models.control import CONTROLNET
from diffsynth_core.models.qwen_image.components import MROPE_PROPORTION, build
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.shapes import ROPE_PROPORTION, split_even
from diffsynth_core.models.tiny import GAINS, diffusers_config, fill, write_json, write_weights
from diffsynth_core.models.tiny_tokenizers import tiny_vocabulary, write_tokenizer

TEMPLATE_WORDS = (
    *(" the", " image", " by", " detailing", " color", " shape", " size", " texture", " quantity", " text", " spatial"),
    *(" relationships", " of", " objects", " and", " background", " key", " features", " input", " (", " then", " how"),
    *(" explain", " user", " instruction", " should", " alter", " or", " modify", " Generate", " a", " new", " that"),
    *(" meets", " requirements", " while", " maintaining", " consistency", " with", " original", " where"),
    *(" appropriate", "system", "user", "assistant", "Describe", "Picture", "color", "'s", "),"),
)
"""Words of the templates that are one token each, as in the real vocabulary, so that the system messages have the 34
and 64 tokens that are dropped.

Words with a leading space come first: merges are applied in order.
"""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens, numbered after the vocabulary."""

ZERO_CONDITION = "*-Image-Edit-2511"
"""Pattern of the hub repositories whose transformer modulates reference tokens with timestep 0."""

IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}
"""The preprocessor_config.json of Qwen2.5-VL."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the random components; widths in channels. `words` are those that are one token each."""

    blocks: int = 2
    heads: int = 2
    head_size: int = 16
    text_width: int = 64
    vae_width: int = 8
    words: tuple[str, ...] = TEMPLATE_WORDS


def write_tiny_weights(base: Path, component: str, model_id: str, pattern: str, sizes: TinySizes = TinySizes()) -> None:
    """Write one component below `base`/`model_id` to a path that matches `pattern`.

    A text encoder includes its tokenizer, and the processor at its default location for all models.
    """
    path = PurePosixPath(pattern)
    folder = base / model_id / path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if component == "text_encoder":
        write_tokenizer(folder.parent / "tokenizer", sizes.words, SPECIAL_TOKENS)
        write_processor(base.joinpath(*QWEN_IMAGE.tokenizers["processor_path"].default.split(":")))
    config = CONFIGS[component](sizes)
    if component == "dit" and fnmatch(model_id, ZERO_CONDITION):
        config["zero_cond_t"] = True
    module = build(component, config).eval()
    fill(module, GAINS[component], seed=0)
    tensors = {
        _file_key(component, name): tensor.detach().to(torch.bfloat16) for name, tensor in module.state_dict().items()
    }
    _write_config(folder / "config.json", component, module, config)
    write_weights(folder, path.name, tensors)


def _transformer(sizes: TinySizes) -> dict[str, Any]:
    return {
        "num_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_size,
        "joint_attention_dim": sizes.text_width,
        "axes_dims_rope": list(split_even(sizes.head_size, ROPE_PROPORTION)),
    }


def _text_encoder(sizes: TinySizes) -> dict[str, Any]:
    heads = 4
    head_size = sizes.text_width // heads
    sections = split_even(head_size, MROPE_PROPORTION)
    words = len(tiny_vocabulary(sizes.words)[0])
    special = {token: words + number for number, token in enumerate(SPECIAL_TOKENS)}
    return {
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "text_config": {
            "vocab_size": words + len(SPECIAL_TOKENS),
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "hidden_size": sizes.text_width,
            "intermediate_size": 2 * sizes.text_width,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [side // 2 for side in sections]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": sizes.text_width,
            "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": False,
    }


def _vae(sizes: TinySizes) -> dict[str, Any]:
    # With `fill`, latents of photographs have mean 0 and a standard deviation of about 0.64 in each channel.
    return {"base_dim": sizes.vae_width, "latents_mean": [0.0] * 16, "latents_std": [0.64] * 16}


CONFIGS = {"dit": _transformer, "text_encoder": _text_encoder, "vae": _vae, CONTROLNET: _transformer}
"""Component -> constructor options."""


def _file_key(component: str, name: str) -> str:
    """Return the key of a tensor in published files; those of the text encoder use earlier module names."""
    if component != "text_encoder":
        return name
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def _write_config(path: Path, component: str, module: Any, config: dict[str, Any]) -> None:
    if component == "text_encoder":
        content = {"architectures": [type(module).__name__], "model_type": "qwen2_5_vl", **config}
    else:
        content = diffusers_config(module)
    write_json(path, content)


def write_processor(folder: Path) -> None:
    """Write the folder of the processor, of which only the image processor is used."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preprocessor_config.json", IMAGE_PROCESSOR)
