"""`compile`: what it does not go with, and what it needs; one report, before loading."""

import pytest

from tests.naming import names

DIT = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (("--blocks_to_swap", 1), names("compile", "blocks_to_swap", "fetches the weights"), names("--compile", "--blocks_to_swap")),
        (("--enable_model_cpu_offload",), names("compile", "enable_model_cpu_offload"), names("--compile", "--enable_model_cpu_offload")),
        (("--fused_backward",), names("compile", "fused_backward", "all of its gradients"), names("--compile", "--fused_backward")),
        (("--use_gradient_checkpointing_offload",), names("compile", "use_gradient_checkpointing_offload"), names("--compile")),
        (("--use_gradient_checkpointing", "--checkpointing", "nested"), names("compile", "nested"), names("--compile", "--checkpointing full")),
        (("--use_gradient_checkpointing", "--checkpointing", "keep_attention"), names("compile", "keep_attention"), names("--compile", "--checkpointing full")),
        (("--quant_options", f"{DIT}:nf4"), names("compile", "nf4", "dit"), names("int8", "fp8", "--compile")),
    ],
)  # fmt: skip
def test_it_is_one_problem(refuse, flags, message, hint):
    assert refuse("--compile", *flags) == (2, [(message, hint)])


def test_there_is_no_compiler(refuse, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refuse("--compile") == (1, [(names("compile", "no-such-compiler"), names("--compile"))])


def test_the_plan_counts_batch_shapes(cli, dataset, models):
    flags = ("--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run", "--compile")
    outcome = cli("train", *flags)
    assert outcome.code == 0
    assert "blocks of dit are compiled for up to" in outcome.out + outcome.err
