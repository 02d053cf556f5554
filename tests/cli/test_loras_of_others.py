"""LoRAs published by other programs as input of each command: a rejection names a command that works."""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import read_problems
from tests.loras import RANK, TinyFamily
from tests.outcome import Outcome

SIZES = (r"[\d.]+ (B|kB|MB|GB)", r"[\d.]+/s", r"[0-9.]+%")


@pytest.fixture
def family(cli, tiny_families, monkeypatch) -> Callable[[str], TinyFamily]:
    """The tiny model of a family, where commands find it."""

    def use(name: str) -> TinyFamily:
        tiny: TinyFamily = tiny_families(name)
        monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny.base))
        return tiny

    return use


@pytest.fixture
def plan(cli) -> Callable[..., Outcome]:
    """Run a dry run with additional parameters; of duplicates the last one counts."""

    def run(tiny: TinyFamily, *arguments: object) -> Outcome:
        flags = tiny.flags(output_path="unused")
        for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
            flags[str(flag).removeprefix("--")] = str(value)
        return cli(
            "train", *(text for name, value in flags.items() for text in (f"--{name}", value)), "--dry_run", "--verbose"
        )

    return run


def weights_of(tiny: TinyFamily) -> dict[str, Tensor]:
    """The tensors of the transformer."""
    paths = tiny.plan(output_path="unused").model.components["dit"].paths
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def halves(shapes: Mapping[str, tuple[int, ...]], spelling: str, rank: int = RANK) -> dict[str, Tensor]:
    """A LoRA with a separate lora_A for each module; `spelling` has the module at `{}`."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        stem = spelling.format(module)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return tensors


def hint_command(hint: str, which: int = 0) -> list[str]:
    """Return one of the commands in a hint, split into words."""
    return shlex.split(re.findall(r"`(diffsynth [^`]+|--[^`]+)`", hint)[which])


def test_separate_q_k_v_of_flux_start_the_fused_layers(family, plan, says):
    """As trained by diffusers and ai-toolkit: the hint names the rank, and the plan describes the result."""
    tiny = family("flux")
    weights = weights_of(tiny)
    width = weights["double_blocks.0.img_attn.qkv.weight"].shape[1]
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    save_file(halves(dict.fromkeys(names, (width, width)), "diffusion_model.{}"), "separate.safetensors")
    refused = plan(tiny, "--lora_checkpoint", "separate.safetensors")
    assert refused.code == 2
    [(message, hint)] = read_problems(refused.err)
    assert message == f"`separate.safetensors` has rank {3 * RANK}, but `lora_rank` is {RANK}"
    outcome = plan(tiny, "--lora_checkpoint", "separate.safetensors", *hint_command(hint))
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "LoRA initialized from" in line]
    assert f"LoRA of rank {3 * RANK} on" in outcome.out
    says(refused.err + line, *SIZES)


WAN_DIFFERENCES = {
    "blocks.0.norm3.diff": "blocks.0.norm3.weight",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "blocks.0.diff_m": "blocks.0.modulation",
    "head.diff_m": "head.modulation",
    "patch_embedding.diff": "patch_embedding.weight",
}
"""Keys written by ModelTC/LightX2V for Wan."""


@pytest.fixture
def lightx2v(family) -> TinyFamily:
    """The tiny Wan, and `lightx2v.safetensors` and `whole.safetensors` for it: LoRA and full differences, or only
    those.
    """
    tiny = family("wan")
    weights = weights_of(tiny)
    differences = {
        f"diffusion_model.{key}": torch.full_like(weights[name], 0.25) for key, name in WAN_DIFFERENCES.items()
    }
    rows, columns = weights["blocks.0.self_attn.q.weight"].shape
    lora = halves({"blocks.0.self_attn.q": (rows, columns)}, "diffusion_model.{}")
    save_file(lora | differences, "lightx2v.safetensors")
    save_file(differences, "whole.safetensors")
    return tiny


@pytest.mark.parametrize("name", ["lightx2v", "whole"])
def test_whole_differences_are_merged_into_a_base(cli, lightx2v, says, name):
    before = weights_of(lightx2v)
    outcome = cli(
        "merge-lora", "--base", "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors", "--output_path", "out",
        "--lora", f"{name}.safetensors:0.5", "--dtype", "float32",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    says(outcome, *SIZES)
    after = {key: tensor for path in Path("out").glob("*.safetensors") for key, tensor in load_file(path).items()}
    expected = {key: tensor.float() for key, tensor in before.items()}
    for tensor in WAN_DIFFERENCES.values():
        expected[tensor] = expected[tensor] + 0.5 * 0.25
    if name == "lightx2v":
        given = load_file("lightx2v.safetensors")
        down, up = (given[f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight"] for half in ("down", "up"))
        expected["blocks.0.self_attn.q.weight"] = expected["blocks.0.self_attn.q.weight"] + 0.5 * up @ down
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(after[key], tensor, rtol=0, atol=1e-6), key


@pytest.mark.parametrize("name", ["lightx2v", "whole"])
def test_whole_differences_are_taken_as_a_preset(lightx2v, plan, name):
    outcome = plan(lightx2v, "--preset_lora_path", f"{name}.safetensors", "--preset_lora_model", "dit")
    assert outcome.code == 0, outcome.err
    modules = "1 module and " if name == "lightx2v" else ""
    assert f"`{name}.safetensors` merged into {modules}6 tensors by full-weight differences" in outcome.out


def test_no_lora_starts_from_whole_differences(lightx2v, cli, plan, says):
    """Neither alternative of the hint applies."""
    refused = plan(lightx2v, "--lora_checkpoint", "lightx2v.safetensors")
    [(message, hint)] = read_problems(refused.err)
    assert message.startswith(
        "`lightx2v.safetensors` changes 6 tensors by full-weight differences, which a LoRA cannot be initialized"
    )
    says(refused, *SIZES)
    assert plan(lightx2v, *hint_command(hint, 0)).code == 0
    converted = cli(*hint_command(hint, 1)[1:])
    assert converted.code == 0 and "6 keys skipped" in converted.err, converted.err
    outcome = plan(lightx2v, "--lora_checkpoint", "lightx2v-dit.safetensors")
    assert outcome.code == 0, outcome.err


def test_whole_differences_have_no_place_in_a_lora_format(lightx2v, cli, says):
    arguments = ("--to", "diffusers", "-o", "out.safetensors")
    refused = cli("convert-lora", "lightx2v.safetensors", *arguments)
    [(message, hint)] = read_problems(refused.err)
    assert "6 full-weight differences" in message and "`--allow_unmatched`" in hint
    alone = cli("convert-lora", "whole.safetensors", *arguments)
    assert (refused.code, alone.code) == (1, 1)
    says(refused.err + alone.err)
    outcome = cli("convert-lora", "lightx2v.safetensors", *arguments, "--allow_unmatched")
    assert outcome.code == 0 and "6 keys skipped: `diffusion_model.blocks.0.diff_m`" in outcome.err


MODULATION, Q = "transformer_blocks.0.img_mod.1", "transformer_blocks.0.attn.to_q"


def test_loras_in_several_formats_become_one(cli, says):
    shapes = {MODULATION: (48, 8), Q: (8, 8)}
    first, second = halves(shapes, "transformer.{}", 2), halves(shapes, "{}", 3)
    save_file(first, "first.safetensors")
    save_file({key.replace(".", "_", key.count(".") - 2): t for key, t in second.items()}, "second.safetensors")
    save_file({f"lora_unet_{key}": t for key, t in load_file("second.safetensors").items()}, "second.safetensors")
    outcome = cli(
        "merge-lora",
        "--lora",
        "first.safetensors",
        "--lora",
        "second.safetensors:-0.5",
        "--output_path",
        "one.safetensors",
    )
    assert outcome.code == 0, outcome.err
    says(outcome, *SIZES)
    found = load_file("one.safetensors")
    for module in shapes:
        expected = first[f"transformer.{module}.lora_up.weight"] @ first[f"transformer.{module}.lora_down.weight"]
        expected = expected - 0.5 * second[f"{module}.lora_up.weight"] @ second[f"{module}.lora_down.weight"]
        stem = f"lora_unet_{module.replace('.', '_')}"
        change = found[f"{stem}.lora_up.weight"] @ found[f"{stem}.lora_down.weight"]
        assert torch.allclose(change, expected, rtol=0, atol=1e-6)
        assert found[f"{stem}.alpha"] == 5


def test_one_prefix_before_the_names_of_two_programs_is_brought_to_one(cli):
    """One module is not taken for two."""
    original, diffusers = "double_blocks_0_img_attn_proj", "transformer_blocks_0_attn_to_out_0"
    more = {"double_blocks_0_img_mod_lin": (48, 8), "transformer_blocks_0_norm1_linear": (48, 8)}
    for name, module in {"first": original, "second": diffusers}.items():
        shapes = {module: (8, 8)} | {key: more[key] for key in more if key.split("_")[0] == module.split("_")[0]}
        save_file(halves(shapes, "lora_unet_{}", 2), f"{name}.safetensors")
    outcome = cli(
        "merge-lora", "--lora", "first.safetensors", "--lora", "second.safetensors", "--output_path", "one.safetensors"
    )
    assert outcome.code == 0, outcome.err
    found = load_file("one.safetensors")
    assert {key.partition(".")[0] for key in found} == {
        f"lora_unet_{original}",
        "lora_unet_double_blocks_0_img_mod_lin",
    }
    assert found[f"lora_unet_{original}.alpha"] == 4


def test_a_file_that_fits_several_families_asks(cli, says):
    save_file(halves({Q: (8, 8)}, "transformer.{}"), "first.safetensors")
    save_file({"lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.ones(1, 8), "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(8, 1)}, "second.safetensors")  # fmt: skip
    merge = (
        "merge-lora",
        "--lora",
        "first.safetensors",
        "--lora",
        "second.safetensors",
        "--output_path",
        "o.safetensors",
    )
    convert = ("convert-lora", "second.safetensors", "--to", "diffusers", "-o", "o.safetensors")
    outcomes = [cli(*command) for command in (merge, convert)]
    for outcome in outcomes:
        [(message, hint)] = read_problems(outcome.err)
        assert outcome.code == 1 and "may be a LoRA of qwen-image or flux or flux2" in message and "`--family`" in hint
    says("".join(outcome.err for outcome in outcomes))
    for command in (merge, convert):
        outcome = cli(*command, "--family", "flux", "--overwrite")
        assert outcome.code == 0, outcome.err


def test_a_format_that_nothing_loads_is_told_where_it_is_written(cli, family, plan):
    note = "only `diffsynth` loads a LoRA of FLUX.1 in the format `diffsynth`"
    save_file(
        halves({"double_blocks.0.img_attn.proj": (8, 8), "double_blocks.0.img_mod.lin": (48, 8)}, "{}"),
        "mine.safetensors",
    )
    arguments = ("convert-lora", "mine.safetensors", "--family", "flux", "-o")
    assert note in cli(*arguments, "a.safetensors", "--to", "diffsynth").err
    assert note not in cli(*arguments, "b.safetensors", "--to", "kohya").err
    tiny = family("flux")
    assert note in plan(tiny, "--lora_format", "diffsynth").out
    assert note not in plan(tiny, "--lora_format", "kohya").out
