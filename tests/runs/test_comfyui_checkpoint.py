"""A full checkpoint of FLUX.2 for ComfyUI: the command that a run ends with, given as it is printed."""

import shlex

from safetensors.torch import load_file

from tests.loras import TinyFamily


def test_a_full_run_of_flux2_ends_with_the_command_for_comfyui(cli, tiny_families, monkeypatch):
    tiny: TinyFamily = tiny_families("flux2")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny.base))
    flags = tiny.flags(recipe="flux.2-klein-4b-full", output_path="run", max_steps=1)
    kept = {name: value for name, value in flags.items() if name not in ("lora_rank", "lora_format")}
    outcome = cli("train", *(text for name, value in kept.items() for text in (f"--{name}", value)))
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in (outcome.out + outcome.err).splitlines() if line.startswith("ComfyUI ")]
    outcome = cli(*shlex.split(line.removeprefix("ComfyUI"))[1:])
    assert outcome.code == 0, outcome.err
    (written,) = {line.split()[0] for line in outcome.out.splitlines() if ".safetensors" in line}
    assert "double_blocks.0.img_attn.qkv.weight" in load_file(written)
