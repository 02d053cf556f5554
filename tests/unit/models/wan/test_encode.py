"""How often Wan's VAE encodes a clip with its conditioning frames."""

import pytest
import torch

from diffsynth_core.models.registry import load_family
from diffsynth_core.models.wan import encode
from diffsynth_core.models.wan.spec import WAN

I2V = {"dit": {"patch_embedding.weight": (1, 36), "proj_out.weight": (64, 1)}}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return load_family("wan").build("vae", {"base_dim": 4}).eval()


@pytest.mark.parametrize(("frames", "generated", "passes"), [(5, True, 1), (5, False, 2), (1, False, 1)])
def test_a_clip_of_conditioning_frames_alone_is_encoded_once(vae, monkeypatch, frames, generated, passes):
    calls = []
    once = encode.encode_normalized
    monkeypatch.setattr(encode, "encode_normalized", lambda *given: (calls.append(given), once(*given))[1])
    (facts,) = (one for one in WAN.variant(I2V, ("input_image",), "").encoders if one.component == "vae")
    clip = torch.rand(3, frames, 16, 16) * 2 - 1
    if generated:
        clip[:, 1:] = 0
    with torch.no_grad():
        encoded = load_family("wan").encode(facts, {"vae": vae}, {"video": clip})
        alone = once(vae, [clip])[0]
    assert len(calls) == passes
    assert torch.equal(encoded["latents"], alone)
    assert torch.equal(encoded["condition"][4:], alone) is (passes == 1)
