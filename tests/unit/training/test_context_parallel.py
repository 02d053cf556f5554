"""Queries and keys in the dtype of the values, where norms are computed in float32."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from diffsynth_core.training.context_parallel import keep_dtypes


class InFloat32(nn.RMSNorm):
    """What autocast makes of a norm on CUDA devices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


def test_queries_and_keys_have_the_dtype_of_the_values():
    attention = WanAttention(32, heads=2, dim_head=16)
    attention.norm_q, attention.norm_k = InFloat32(32), InFloat32(32)
    states = torch.ones(1, 4, 32, dtype=torch.bfloat16)
    assert attention.norm_q(states).dtype == torch.float32
    keep_dtypes(attention)
    assert {attention.norm_q(states).dtype, attention.norm_k(states).dtype} == {torch.bfloat16}
