"""Operations of a step at published sizes, and what they depend on."""

import pytest

from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.planning.memory.flops import step_flops

WITHIN = 0.03
"""The published figures are without the LoRA itself, 2 % of the weights at rank 32, and rounded."""
SQUARE = ((1, 1024, 1024),)
PUBLISHED = {
    "qwen-image-lora": (SQUARE, 256, 240),
    "qwen-image-edit-2511-lora": (SQUARE * 2, 512, 606),
    "flux.1-dev-lora": (SQUARE, 512, 245),
    "flux.2-klein-4b-lora": (SQUARE, 512, 114),
    "flux.2-klein-9b-lora": (SQUARE, 512, 243),
    "wan2.1-t2v-14b-lora": (((81, 480, 832),), 512, 6368),
    "wan2.1-t2v-1.3b-lora": (((81, 480, 832),), 512, 1150),
}
"""Images, text tokens, and TFLOP of a LoRA step with gradient checkpointing: 3 x linear + 4.5 x attention of a
forward pass."""


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_sizes_take_the_operations_that_are_derived_by_hand(plan, recipe):
    images, text_tokens, teraflops = PUBLISHED[recipe]
    found = step_flops(plan(recipe, use_gradient_checkpointing=True), StepSizes(1, images, text_tokens))
    assert found.total / 1e12 == pytest.approx(teraflops, rel=WITHIN)


def test_a_step_is_all_its_samples(plan):
    sizes = StepSizes(1, SQUARE, 512)
    one = step_flops(plan(), sizes)
    four = step_flops(plan(gradient_accumulation_steps=2), StepSizes(2, SQUARE, 512))
    assert four.total == 4 * one.total


def test_the_backward_pass_reaches_back_to_the_first_block_that_trains(plan):
    sizes = StepSizes(1, SQUARE, 512)
    whole, half = (
        step_flops(plan(lora_target_modules=[f"single_blocks.{block}.proj_out"]), sizes) for block in (0, 19)
    )
    assert half.forward == whole.forward
    assert half.recomputed == pytest.approx(whole.recomputed / 2, rel=1e-3)
    assert half.backward == pytest.approx(whole.backward / 2, rel=1e-3)


def test_a_controlnet_that_trains_has_gradients_of_the_transformer_that_it_leads(plan):
    net = "jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors"
    controlled = {"trainable_models": ["controlnet"], "lora_base_model": None, "extra_inputs": ["controlnet_image"]}
    made = plan()
    entries = [*made.parameters.model_id_with_origin_paths, net]
    controlled |= {"model_id_with_origin_paths": entries, "lora_target_modules": [], "data_file_keys": ["image"]}
    controlled["align_to_opensource_format"] = False
    sizes = StepSizes(1, SQUARE, 512)
    alone, found = step_flops(made, sizes), step_flops(plan(**controlled), sizes)
    assert found.forward > alone.forward
    assert found.backward > 0.9 * alone.backward


def test_the_work_of_an_encoder_that_trains_is_not_known(plan):
    assert step_flops(plan(trainable_models=["dit", "text_encoder_1"]), StepSizes(1, SQUARE, 512)) is None
