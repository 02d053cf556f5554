"""Which float32 operations are computed in TF32: PyTorch's settings, as they are."""

import torch

from diffsynth_core.planning.device import operations_in_tf32


def test_operations_in_tf32_are_those_that_pytorch_is_set_to(monkeypatch):
    matrix, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for precisions, expected in {
        ("ieee", "tf32"): ("convolutions",),
        ("tf32", "tf32"): ("matrix products", "convolutions"),
        ("ieee", "ieee"): (),
    }.items():
        for backend, precision in zip((matrix, convolution), precisions, strict=True):
            monkeypatch.setattr(backend, "fp32_precision", precision)
        assert operations_in_tf32() == expected
