"""The variant of Wan without a transformer among the files, as in a precompute task."""

import pytest

from diffsynth_core.models.wan.spec import WAN

WAN_2_1 = {"text_encoder": {}, "vae": {"post_quant_conv.weight": (16, 16, 1, 1, 1)}}
WAN_2_2_5B = {"text_encoder": {}, "vae": {"post_quant_conv.weight": (48, 48, 1, 1, 1)}}
WITH_IMAGE_ENCODER = WAN_2_1 | {"image_encoder": {}}


@pytest.mark.parametrize(
    ("shapes", "inputs", "model_id", "encoders"),
    [
        ({}, (), "Wan-AI/Wan2.1-T2V-1.3B", ["text", "latents"]),
        (WAN_2_1, (), "Wan-AI/Wan2.1-T2V-1.3B", ["text", "latents"]),
        (WAN_2_1, ("input_image",), "Wan-AI/Wan2.2-I2V-A14B", ["text", "latents_with_condition"]),
        (
            WITH_IMAGE_ENCODER,
            ("input_image",),
            "Wan-AI/Wan2.1-I2V-14B-480P",
            ["text", "latents_with_condition", "image"],
        ),
        (WAN_2_2_5B, (), "Wan-AI/Wan2.2-TI2V-5B", ["text", "latents"]),
        (WAN_2_2_5B, ("input_image",), "Wan-AI/Wan2.2-TI2V-5B", ["text", "latents_with_first_given"]),
    ],
)
def test_the_other_components_and_the_inputs_tell(shapes, inputs, model_id, encoders):
    variant = WAN.variant(shapes, inputs, "")
    assert variant.model_id == model_id
    assert [encoder.name for encoder in variant.encoders] == encoders


def test_two_frames_with_an_image_encoder_are_those_of_the_model_that_takes_two():
    *_, image = WAN.variant(WITH_IMAGE_ENCODER, ("input_image", "end_image"), "").encoders
    assert image.inputs == ("input_image", "end_image") and not image.first_frame_only
    *_, image = WAN.variant(WITH_IMAGE_ENCODER, ("input_image",), "").encoders
    assert image.inputs == () and image.first_frame_only
