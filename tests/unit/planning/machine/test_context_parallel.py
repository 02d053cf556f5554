"""Processes that compute a sample together: what is refused, what each computes and holds, and when it is suggested."""

from dataclasses import replace
from math import prod

import pytest

from diffsynth_cli.text.estimate import engine_lines
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.planning.documents import plan_of_recipe
from diffsynth_core.planning.machine.context_parallel import context_parallel_problems
from diffsynth_core.planning.memory.estimate import training_memory
from diffsynth_core.planning.memory.fitted import assumed_host_bytes
from diffsynth_core.planning.memory.fitting import engine_fits
from diffsynth_core.planning.memory.flops import step_flops
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import Machine
from tests.naming import names

TRAINED = ("dit",)
CLIP = (81, 480, 832)
"""Frames, height, width: 21 x 30 x 52 tokens."""


@pytest.fixture(scope="module")
def large():
    """The plan of Wan 14B in full, in eight processes."""
    (plan,) = plan_of_recipe("wan2.1-t2v-14b-full")
    return replace(plan, machine=replace(plan.machine, world_size=8))


def together(plan, processes: int):
    return replace(plan, machine=replace(plan.machine, context_parallel=processes))


def asked(count: int, **others: object) -> Parameters:
    return Parameters(context_parallel=count, **others)


def test_processes_that_follow_each_other_compute_the_same():
    machine = Machine(device="cpu", mixed_precision="no", world_size=6, context_parallel=2)
    assert machine.data_parallel == 3
    assert [machine.share(process) for process in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [machine.counts(process) for process in range(6)] == [True, False] * 3
    alone = Machine(device="cpu", mixed_precision="no", world_size=2)
    assert [(alone.share(process), alone.counts(process)) for process in range(2)] == [(0, True), (1, True)]


@pytest.mark.parametrize(
    ("changed", "processes", "what", "hint"),
    [
        ({}, 1, names("context_parallel", "multiple of 2 processes", "is 1 process"), names("--num_processes")),
        ({}, 3, names("multiple of 2 processes", "are 3 processes"), names("--num_processes", "--context_parallel")),
        ({"compile": True}, 2, names("compile", "within blocks"), names("--compile")),
        ({"attention": "flash"}, 2, names("attention", "flash"), names("--attention sdpa")),
        ({"checkpointing": "keep_attention"}, 2, names("keep_attention", "computes again"), names("--checkpointing full")),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(large, changed, processes, what, hint):
    (problem,) = context_parallel_problems(asked(2, **changed), large.model, TRAINED, processes, [CLIP])
    assert problem.wrong_use and problem.message == what and problem.hint == hint
    assert not list(context_parallel_problems(asked(1, **changed), large.model, TRAINED, processes, [CLIP]))


def test_the_rest_goes_with_it(large):
    assert not list(
        context_parallel_problems(asked(2, attention="sdpa", checkpointing="nested"), large.model, TRAINED, 4, [CLIP])
    )


def test_heads_and_tokens_have_to_divide(large):
    assert not list(context_parallel_problems(asked(8), large.model, TRAINED, 8, [CLIP]))
    (heads,) = context_parallel_problems(asked(3), large.model, TRAINED, 3, [CLIP])
    assert heads.message == names("3", "40 attention heads") and heads.hint == names("2, 4, 5, 8, 10, 20 or 40")
    sizes = [CLIP, *((49, 480, width) for width in (816, 848, 880, 912))]
    (odd,) = context_parallel_problems(asked(4), large.model, TRAINED, 4, [CLIP, (1, 480, 816), *sizes])
    assert odd.message == names("816 x 480 x 1 frames (1530 tokens)", "and 2 more") and "832" not in odd.message
    assert odd.hint == names("pass 2, 5 or 10, or", "--num_frames", "16 x 16 pixels of 4 frames")
    (odd,) = context_parallel_problems(asked(4), large.model, TRAINED, 4, [(5, 48, 80), (1, 48, 48)])
    assert odd.hint == names("change `--num_frames`") and "pass" not in odd.hint


def test_another_family_has_no_such_parameter():
    (plan,) = plan_of_recipe("qwen-image-lora")
    assert not list(context_parallel_problems(asked(7), plan.model, TRAINED, 7, [CLIP]))


def test_what_makes_the_target_does_not_train_with_it(large):
    (problem,) = context_parallel_problems(asked(2), large.model, ("dit", "vae"), 2, [CLIP])
    assert problem.message == names("vae does not train", "context_parallel") and problem.hint == names("without vae")
    assert not list(context_parallel_problems(asked(2), large.model, ("dit", "text_encoder"), 2, [CLIP]))


def test_a_process_holds_a_part_of_the_activations_and_all_of_the_weights(large):
    def memory(processes: int):
        plan = together(large, processes)
        return training_memory(plan, memory_config(plan, find_workload(plan).largest))

    alone, pairs, eights = (memory(number) for number in (1, 2, 8))
    assert pairs.weights == alone.weights and pairs.gradients == alone.gradients
    # More than a part by what the first block gets, whole, and by what is exchanged.
    assert alone.activations / 2 < pairs.activations < 0.65 * alone.activations
    assert alone.activations / 8 < eights.activations < 0.25 * alone.activations


def test_the_products_of_a_process_are_its_part_and_the_attention_that_is_repeated(large):
    alone, pairs = (step_flops(together(large, number), find_workload(large).largest) for number in (1, 2))
    tokens, width, blocks = prod((21, 30, 52)), 5120, 40
    attention = 4 * tokens**2 * width * blocks
    assert pairs.forward == pytest.approx(alone.forward / 2, rel=0.01)
    assert pairs.backward == pytest.approx(alone.backward / 2, rel=0.01)
    assert pairs.recomputed == pytest.approx((alone.recomputed + attention) / 2, rel=0.01)


def test_it_is_suggested_where_no_engine_fits_without(large):
    run, limit = find_workload(large), 24 * 2**30
    fits = list(engine_fits(large, memory_config(large, run.largest), limit, assumed_host_bytes(limit), run.encoded))
    assert [fit.fits for fit in fits] == [False, False, False, True]
    assert fits[-1].context_parallel in (2, 4, 8)
    last = list(engine_lines(large, fits, limit))[-1]
    assert last == names("--accelerate_config fsdp2offload", f"--context_parallel {fits[-1].context_parallel}")
