"""Small samples are encoded together: images in batches of one size for each shape, captions of one group."""

import pytest
import torch

from diffsynth_core.models.family import Encoder
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.tokens import Tokens
from diffsynth_core.planning.data.encoder_inputs import scale_pixels
from diffsynth_core.planning.data.encoding_batches import ALONE, BatchKind, EncodingBatches, image_batch

SMALL, LARGE = (3, 1, 64, 64), (3, 1, 256, 256)


class Sums:
    """An encoder that adds up pixels; `sizes` are those of the batches that it was given."""

    def __init__(self) -> None:
        self.sizes = []

    def __call__(self, samples):
        self.sizes.append(len(samples))
        return [{"sum": sample["image"].sum()} for sample in samples]


def samples(*shapes):
    return [{"image": torch.full(shape, float(number)), "prompt": "text"} for number, shape in enumerate(shapes)]


def encoded(batches, given, read=lambda made: float(made["sum"])):
    """Return the sums by reference, in the order in which they were encoded."""
    found = [one for ref, sample in enumerate(given) for one in batches.add(ref, sample)]
    return {ref: read(encoding) for ref, encoding in (*found, *batches.rest())}


def test_samples_of_one_shape_share_batches_and_the_last_is_filled_up():
    encode, given = Sums(), samples(*[SMALL] * 35)
    found = encoded(EncodingBatches(encode, image_batch), given)
    assert encode.sizes == [16, 16, 16]
    assert found == {ref: float(sample["image"].sum()) for ref, sample in enumerate(given)}


def test_shapes_do_not_mix_and_large_samples_do_not_wait():
    encode, given = Sums(), samples(SMALL, LARGE, SMALL, (3, 1, 128, 128), LARGE)
    found = encoded(EncodingBatches(encode, image_batch), given)
    assert encode.sizes == [1, 1, 16, 4]
    assert list(found) == [1, 4, 0, 2, 3]
    assert found == {ref: float(sample["image"].sum()) for ref, sample in enumerate(given)}


def test_other_encoders_take_one_sample_after_the_other():
    encode, given = Sums(), samples(*[SMALL] * 3)
    assert list(encoded(EncodingBatches(encode, lambda sample: ALONE), given)) == [0, 1, 2]
    assert encode.sizes == [1, 1, 1]


def test_captions_of_a_group_share_batches_and_no_copy_is_encoded():
    encode, given = Sums(), samples(*[SMALL] * 11)
    found = encoded(EncodingBatches(encode, lambda sample: BatchKind(float(sample["image"].max()) % 2, 4)), given)
    assert encode.sizes == [4, 4, 2, 1]
    assert list(found) == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 9]
    assert found == {ref: float(sample["image"].sum()) for ref, sample in enumerate(given)}


def test_captions_are_filled_up_except_in_float32_on_a_cpu():
    module, sample = torch.nn.Linear(2, 2), {"prompt": Tokens(torch.arange(300), None, False)}
    assert sizes_of_batches(module, [sample] * 4) == [3, 1]
    assert sizes_of_batches(module.to(torch.bfloat16), [sample] * 4) == [1, 1, 1, 1]
    assert sizes_of_batches(torch.nn.Linear(2, 2, device="meta"), [sample] * 4) == [3, 3]


def sizes_of_batches(module, given):
    """Encode captions with an encoder of Wan that has this module; return the sizes of its batches."""
    family, sizes = load_family("wan"), []

    def encode(facts, components, captions):
        sizes.append(len(captions))
        return [{} for _ in captions]

    encoder = next(one for one in family.facts.variant({}, (), "").encoders if one.name == "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "encoders", {"text": Encoder(encode, batched=True)})
        encoded(EncodingBatches.of(family, encoder, {encoder.component: module}), given, lambda made: made)
    return sizes


def test_what_has_no_pixels_is_not_filled_up():
    assert image_batch({"edit_image": []}).size == 1


def test_reference_images_count_as_well():
    shown = [torch.zeros(3, 1, 128, 128), torch.zeros(3, 1, 64, 64)]
    kind = image_batch({"image": torch.zeros(3, 1, 64, 64), "edit_image": shown})
    assert kind.size == 65536 // (128 * 128 + 2 * 64 * 64)
    assert kind != image_batch({"image": torch.zeros(3, 1, 64, 64), "edit_image": shown[::-1]})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_with_copies_of_a_sample_scales_each_of_them_once(dtype):
    """Conditioning frames are float32, so that scaling them in place would scale the copies again."""
    pixels = torch.full((3, 1, 2, 2), 255, dtype=dtype)
    first, second = (scale_pixels({"input_image": pixels}, torch.device("cpu"))["input_image"] for _ in range(2))
    assert torch.equal(first, torch.ones(3, 1, 2, 2)) and torch.equal(second, first)
    assert torch.equal(pixels, torch.full_like(pixels, 255))
