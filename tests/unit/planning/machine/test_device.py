"""Which float32 operations are computed in TF32: PyTorch's settings, as they are."""

import torch

from diffsynth_core.planning.machine.device import operations_in_tf32


def test_operations_in_tf32_are_those_that_pytorch_is_set_to():
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for precisions, expected in {
            ("ieee", "tf32"): ("convolutions",),
            ("tf32", "tf32"): ("matrix products", "convolutions"),
            ("ieee", "ieee"): (),
        }.items():
            for backend, precision in zip(backends, precisions, strict=True):
                backend.fp32_precision = precision
            assert operations_in_tf32() == expected
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
