"""Qwen-Image's sigmas, packing and batches, by hand."""

import pytest
import torch
from torch.testing import assert_close

from diffsynth_core.models.patches import pack, unpack
from diffsynth_core.models.qwen_image.forward import collate, edit_latents, predict_velocity, sigmas


def test_the_training_sigmas():
    table = sigmas()
    assert table.dtype == torch.float32 and table.shape == (1000,)
    assert [round(table[index].item(), 6) for index in (0, 1, 499, 999)] == [1, 0.999558, 0.696338, 0.02]
    assert table[0] == 1 and (table.diff() < 0).all()
    assert len(table.unique()) == 1000


def test_packing_puts_each_patch_of_two_by_two_into_one_token():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 1, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (1, 6, 8)
    # token 4 is row 1, column 1 of the patches: rows 2-3, columns 2-3 of both channels
    assert tokens[0, 4].tolist() == [14, 15, 20, 21, 24 + 14, 24 + 15, 24 + 20, 24 + 21]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (6, 4), (32, 2)])
def test_unpacking_undoes_packing(height, width):
    latents = torch.randn(3, 16, 1, height, width)
    assert torch.equal(unpack(pack(latents), height, width), latents)


def encoded(length: int, value: float) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((16, 1, 2, 2), value), "prompt_embeds": torch.full((length, 3), value)}


def test_captions_of_one_length_need_no_mask():
    batch = collate([encoded(2, 1.0), encoded(2, 2.0)])
    assert batch.keys() == {"latents", "prompt_embeds"}
    assert batch["latents"].shape == (2, 16, 1, 2, 2)
    assert batch["prompt_embeds"][:, 0, 0].tolist() == [1, 2]


def test_shorter_captions_are_padded_and_masked():
    batch = collate([encoded(1, 1.0), encoded(3, 2.0), encoded(2, 3.0)])
    assert batch["prompt_embeds"][..., 0].tolist() == [[1, 0, 0], [2, 2, 2], [3, 3, 0]]
    assert batch["prompt_mask"].tolist() == [[True, False, False], [True] * 3, [True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_formats_are_kept(dtype):
    sample = encoded(2, 1.0)
    sample["prompt_embeds"] = sample["prompt_embeds"].to(dtype)
    assert_close(collate([sample])["prompt_embeds"], torch.ones(1, 2, 3, dtype=dtype))


# Images to edit


def edited(length: int, value: float) -> dict[str, torch.Tensor]:
    """A sample with two reference images of different sizes."""
    shown = {"edit_latents_0": torch.full((16, 1, 4, 2), value), "edit_latents_1": torch.full((16, 1, 2, 6), -value)}
    return {**shown, **encoded(length, value)}


def test_images_to_edit_are_stacked_each_in_its_size():
    batch = collate([edited(1, 1.0), edited(3, 2.0)])
    assert batch.keys() == {"latents", "edit_latents_0", "edit_latents_1", "prompt_embeds", "prompt_mask"}
    first, second = edit_latents(batch)
    assert (first.shape, second.shape) == ((2, 16, 1, 4, 2), (2, 16, 1, 2, 6))
    assert first[:, 0, 0, 0, 0].tolist() == [1, 2]


def test_images_to_edit_are_in_the_order_of_their_numbers():
    batch = {f"edit_latents_{number}": torch.tensor(number) for number in (10, 2, 0, 1, 9, 8, 7, 6, 5, 4, 3)}
    assert [int(number) for number in edit_latents(batch)] == list(range(11))
    assert edit_latents({"latents": torch.zeros(1)}) == []


class Recorder:
    """Replaces the transformer: records its inputs, and returns its tokens."""

    dtype = torch.float32

    def __call__(self, **given: object) -> tuple[torch.Tensor]:
        self.given = given
        return (given["hidden_states"],)  # type: ignore[return-value]


def test_tokens_of_images_to_edit_stand_behind_and_are_cut_off():
    transformer, batch = Recorder(), collate([edited(2, 1.0), edited(2, 2.0)])
    noisy = torch.randn(2, 16, 1, 2, 4)
    prediction = predict_velocity(transformer, noisy, torch.tensor([0.1, 0.9]), batch)
    assert torch.equal(prediction, noisy)
    assert transformer.given["img_shapes"] == [[(1, 1, 2), (1, 2, 1), (1, 1, 3)]] * 2
    tokens = transformer.given["hidden_states"]
    assert tokens.shape == (2, 2 + 2 + 3, 64)
    assert tokens[:, 2:, 0].tolist() == [[1, 1, -1, -1, -1], [2, 2, -2, -2, -2]]
