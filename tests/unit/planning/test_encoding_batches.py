"""Small samples are encoded together: images in batches of one size for each shape, captions of one group."""

import torch

from diffsynth_core.planning.encoding_batches import ALONE, BatchKind, EncodingBatches, image_batch, rounds_alike

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


def encoded(batches, given):
    """Return the sums by reference, in the order in which they were encoded."""
    found = [one for ref, sample in enumerate(given) for one in batches.add(ref, sample)]
    return {ref: float(encoding["sum"]) for ref, encoding in (*found, *batches.rest())}


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


def test_only_float32_on_a_cpu_rounds_alike():
    module = torch.nn.Linear(2, 2)
    assert rounds_alike(module)
    assert not rounds_alike(module.to(torch.bfloat16))
    assert not rounds_alike(torch.nn.Linear(2, 2, device="meta"))
