"""Dtypes by their names in safetensors headers: their sizes, and their names in torch. No torch is imported before use.

Format: https://github.com/huggingface/safetensors#format.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS_PER_ELEMENT = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Safetensors dtype -> bits per element."""
FLOATING_POINT = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Dtypes of weights as they were trained or rounded; `F8_E8M0` holds powers of two alone, which are scales."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Dtypes that tensors are read and written in, by their names in safetensors -> in torch."""
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
"""Name in torch -> safetensors dtype."""


def safetensors_dtype(dtype: "torch.dtype") -> str:
    """The name of a torch dtype in safetensors.

    Raises:
        KeyError: when no weights are stored in it.
    """
    return SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a name in safetensors.

    Raises:
        KeyError: when tensors of this dtype are not read.
    """
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype
