"""`attention`: kernels without gradients or masks, and other devices and dtypes: one report, before loading."""

import pytest

from tests.naming import names


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (("--attention", "sage"), names("attention", "sage", "no backward pass"), names("auto, sdpa, flash, efficient, cudnn")),
        (("--attention", "flash3"), names("attention", "flash3", "without a backward pass"), names("sdpa")),
        (("--attention", "cudnn"), names("attention", "cudnn", "on cuda", "the device is cpu"), names("--attention sdpa")),
        (("--attention", "efficient"), names("attention", "efficient", "the device is cpu"), names("--attention sdpa")),
        (("--attention", "flash", "--batch_size", 2), names("flash", "no masks", "different lengths"), names("--batch_size 1", "--attention sdpa")),
    ],
)  # fmt: skip
def test_it_is_one_problem(refuse, flags, message, hint):
    assert refuse(*flags) == (2, [(message, hint)])


def test_a_dry_run_is_planned_for_a_gpu(cli, dataset, models):
    flags = ("--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run")
    assert cli("train", *flags, "--attention", "cudnn").code == 0
    refused = cli("train", *flags, "--attention", "cudnn", "--mixed_precision", "no")
    assert refused.code == 2
    assert "`attention` `cudnn` computes in bf16 or fp16 on cuda, but the run in float32" in refused.err
