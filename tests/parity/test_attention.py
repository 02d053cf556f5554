"""Attention kernels: the same gradients of queries, keys and values, and of a training step of every family."""

import math

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

from diffsynth_core.models.attention import ATTENTION_KERNELS, set_attention
from diffsynth_core.models.registry import load_family
from tests.parity.float8_runs import RECIPES, Step, plan_step
from tests.parity.test_batches import micro_batch, train_setup

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAMED = [name for name, kernel in ATTENTION_KERNELS.items() if not kernel.no_gradients and kernel.backend]
CASES = [
    pytest.param(kernel.backend, device, DTYPES[precision], id=f"{name}-{device}-{precision}")
    for name, kernel in ATTENTION_KERNELS.items()
    if name in NAMED
    for device in DEVICES
    for precision in (kernel.precisions.get(device, ()) if kernel.precisions else DTYPES)
    if device != "cpu" or precision != "fp16"
]
ON_CPUS = [name for name in NAMED if "cpu" in (ATTENTION_KERNELS[name].precisions or ("cpu",))]


def draw(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, `[2, 24, 4, 32]`."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 24, 4, 32, generator=generator).to(device, dtype) for _ in range(4)]
    return [*(tensor.requires_grad_() for tensor in drawn[:3]), drawn[3]]


def by_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads in the third dimension: equation 1 of https://arxiv.org/abs/1706.03762."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.mark.parametrize(("backend", "device", "dtype"), CASES)
def test_queries_keys_and_values_get_their_gradients(backend, device, dtype):
    *inputs, upstream = draw(device, dtype)
    result = dispatch_attention_fn(*inputs, backend=AttentionBackendName(backend))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = by_formula(*exact)
    result.backward(upstream)
    expected.backward(upstream.double())
    pairs = zip(
        (result.detach(), *(one.grad for one in inputs)), (expected.detach(), *(one.grad for one in exact)), strict=True
    )
    assert max(float((found.double() - wanted).abs().max()) for found, wanted in pairs) < 16 * torch.finfo(dtype).eps


def test_flash_attention_3_has_no_backward_pass():
    """Else it need not be refused; on the meta device its operation needs neither package nor GPU."""
    *inputs, _ = draw("meta", torch.bfloat16)
    result = dispatch_attention_fn(*inputs, backend=AttentionBackendName(ATTENTION_KERNELS["flash3"].backend))
    with pytest.raises(RuntimeError, match="autograd formula"):
        result.sum().backward()


@pytest.mark.parametrize("family", RECIPES)
def test_a_step_computes_with_the_kernel_of_the_run(family, tmp_path):
    """And the kernels of a CPU compute the same gradients, without a change of the default of the process."""
    batch_size = 1 if load_family(family).facts.masks_captions else 2
    step = Step(plan_step(family, tmp_path, attention="flash", batch_size=batch_size))
    assert len(step.micro_batch.refs) == batch_size
    chosen = {part.processor._attention_backend for part in step.model.modules() if hasattr(part, "processor")}
    assert chosen == {AttentionBackendName(ATTENTION_KERNELS["flash"].backend)}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    found = {}
    for name in ON_CPUS:
        set_attention(step.model, name)
        step.model.zero_grad()
        found[name] = {weight: gradient.clone() for weight, gradient in step.gradients().items()}
    largest = max(float(gradient.abs().max()) for gradient in found["sdpa"].values())
    for name in ON_CPUS:
        worst = max(float((found[name][weight] - found["sdpa"][weight]).abs().max()) for weight in found["sdpa"])
        assert worst < 1e-6 < largest


def test_the_kernel_of_the_run_computes(family, photographs, tiny_models, monkeypatch, tmp_path):
    """It takes no mask, which this batch has; such a run is refused (tests/cli/test_wrong_attention.py)."""
    monkeypatch.chdir(tmp_path)
    model, encodings = train_setup(family, photographs, tiny_models, "qwen-image-lora")
    batch = micro_batch(encodings, [0, 1, 2, 3])
    model(batch).sum().backward()
    set_attention(model, "flash")
    with pytest.raises(ValueError, match="attn_mask"):
        model(batch)
