"""The scripts behind `make tiny-model`, with few steps."""

import pytest
import torch

from diffsynth_core.hub.model_folder import shipped_folder
from tests.shapes.build import Amounts, build, compare
from tests.shapes.untrained import MODEL_ID

FEW = Amounts(vae_images=32, vae_steps=3, decoder_steps=2, images=128, epochs=1)


@pytest.mark.long
def test_a_second_build_gives_the_same_bytes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first, second = (build(tmp_path / name, FEW) for name in ("first", "second"))
    torch.set_num_threads(threads)
    capfd.readouterr()
    compare(second, first)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 11 and all(line.endswith("as shipped") and "not" not in line for line in lines), lines
    compare(second, shipped_folder(MODEL_ID))
    differing = [line.split()[0] for line in capfd.readouterr().out.splitlines() if line.endswith("not as shipped")]
    assert differing == [
        "transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
