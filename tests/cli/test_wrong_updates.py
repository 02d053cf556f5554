"""Updates and recomputation in the backward pass, a state in host memory, and what contradicts them: one report."""

import pytest

from tests.naming import names

FUSED, ON_HOST = "--fused_backward", "--enable_optimizer_cpu_offload"
CASES = [
    ((FUSED, "--gradient_accumulation_steps", 4), names("gradient_accumulation_steps", "4 backward passes", "fused_backward"), names("remove one of them")),
    ((FUSED, "--max_grad_norm", 1), names("max_grad_norm", "the norm of all gradients", "fused_backward"), names("remove one of them")),
    ((FUSED, "--num_processes", 2), names("2 processes", "fused_backward"), names("one process", "--fused_backward")),
    ((FUSED, "--optimizer", "prodigy", "--learning_rate", 1), names("fused_backward", "one tensor after the other", "prodigy"), names("remove", "--fused_backward", "adamw")),
    ((ON_HOST, "--optimizer", "prodigy", "--learning_rate", 1), names("enable_optimizer_cpu_offload", "one tensor after the other", "prodigy"), names("remove", ON_HOST, "adamw")),
    ((ON_HOST, "--optimizer", "torch.optim.NAdam"), names("enable_optimizer_cpu_offload", "torch.optim.NAdam"), names("adafactor")),
    (("--no-use_gradient_checkpointing", "--checkpointing", "nested"), names("checkpointing", "nested", "no activations are recomputed"), names("--use_gradient_checkpointing", "remove")),
    (("--use_gradient_checkpointing_offload", "--checkpointing", "keep_attention"), names("checkpointing", "keep_attention", "use_gradient_checkpointing_offload"), names("remove one of them")),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message", "hint"), CASES)
def test_it_is_one_problem(refuse, flags, message, hint):
    code, problems = refuse(*flags)
    assert (code, problems) == (2, [(message, hint)])


def test_all_are_reported_together(refuse):
    flags = (FUSED, "--gradient_accumulation_steps", 2, "--max_grad_norm", 1, "--mixed_precision", "fp16")
    code, problems = refuse(*flags)
    assert code == 2
    named = ("gradient_accumulation_steps", "max_grad_norm", "fp16 skips", "fp16` needs a GPU")
    assert [name for name in named if not any(name in str(message) for message, _ in problems)] == []


SWAP = ("--blocks_to_swap", 2)
GOOD = (*SWAP, FUSED, "--use_gradient_checkpointing")


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ((*SWAP, "--use_gradient_checkpointing"), names("blocks_to_swap", "dit train", "only with", "--fused_backward"), names("pass", "--fused_backward", "--blocks_to_swap")),
        ((*SWAP, "--no-use_gradient_checkpointing"), names("blocks_to_swap", "--fused_backward", "--use_gradient_checkpointing"), names("--fused_backward --use_gradient_checkpointing")),
        ((*GOOD, "--cpu_offload_split_threshold", 1), names("cpu_offload_split_threshold", "as a whole"), names("remove it")),
        ((*GOOD, "--checkpointing", "keep_every_2"), names("blocks_to_swap", "dit train", "only if nothing of them is kept"), names("--checkpointing keep_every_2", "--blocks_to_swap")),
        (("--blocks_to_swap", 3, *GOOD[2:]), names("blocks_to_swap", "3", "2 blocks"), names("--blocks_to_swap 2")),
    ],
)  # fmt: skip
def test_blocks_that_cannot_train_from_host_memory(refuse, flags, message, hint):
    code, problems = refuse(*flags, recipe="qwen-image-full")
    assert (code, problems) == (2, [(message, hint)])
