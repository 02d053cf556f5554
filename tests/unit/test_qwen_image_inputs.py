"""Qwen-Image's sigmas, packing and batches, by hand."""

import pytest
import torch
from torch.testing import assert_close

from diffsynth_core.families.qwen_image.inputs import collate, pack, sigmas, unpack


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
