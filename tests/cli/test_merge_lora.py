"""`merge-lora`: exact messages, and inputs that it rejects."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.progress import format_bytes
from tests.cli.conftest import HubAccessError, read_problems, stamps, without_progress
from tests.naming import names

TRANSFORMER = "Qwen/Qwen-Image/transformer"
Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def lora(models: Path, tmp_path) -> Path:
    """A LoRA of one module of the tiny Qwen-Image, with alpha = 2 x rank."""
    weights = {}
    for file in (models / TRANSFORMER).glob("*.safetensors"):
        weights |= load_file(file)
    rows, columns = weights[f"{Q}.weight"].shape
    stem = f"lora_unet_{Q.replace('.', '_')}"
    tensors = {
        f"{stem}.lora_down.weight": torch.full((2, columns), 0.125),
        f"{stem}.lora_up.weight": torch.full((rows, 2), 0.25),
        f"{stem}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "work" / "lora.safetensors")
    return Path("lora.safetensors")


def shard_of_q(models: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The shard that contains the module, and its tensors."""
    found = ((path, load_file(path)) for path in (models / TRANSFORMER).glob("*.safetensors"))
    return next((path, tensors) for path, tensors in found if f"{Q}.weight" in tensors)


@pytest.fixture
def refused(cli, says, tmp_path) -> Callable[..., HubAccessError]:
    """A command line that must be refused, with nothing written."""

    def run(*arguments: object) -> HubAccessError:
        before = stamps(tmp_path / "work")
        outcome = cli("merge-lora", *arguments)
        assert outcome.code != 0 and "Traceback" not in outcome.err and outcome.out == ""
        assert stamps(tmp_path / "work") == before
        says(f"exit code {outcome.code}\n{outcome.err}")
        return outcome.code, read_problems(outcome.err)

    return run


@pytest.mark.parametrize("base", ["path", "entry"])
def test_into_a_base_by_folder_or_by_model_id(cli, says, models, lora, base):
    """The file names of the base are kept; the change is 2 x (0.25 x 0.125 + 0.25 x 0.125) x 0.5 everywhere."""
    text = models / TRANSFORMER if base == "path" else "Qwen/Qwen-Image:transformer/*.safetensors"
    outcome = cli("merge-lora", "--base", text, "--lora", f"{lora}:0.5", "--output_path", "out", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    written = sorted(Path("out").iterdir())
    assert [path.name for path in written] == [path.name for path in sorted((models / TRANSFORMER).glob("*model*"))]
    before, after = ({}, {})
    for path in written:
        if path.suffix == ".safetensors":
            before |= load_file(models / TRANSFORMER / path.name)
            after |= load_file(path)
    moved = after[f"{Q}.weight"] - before[f"{Q}.weight"].float()
    assert torch.allclose(moved, torch.full_like(moved, 0.0625), atol=1e-6)
    lines = outcome.out.splitlines()
    assert lines[0] == names("Qwen-Image", "1 tensor", f"of {len(before)} changed")
    assert " ".join(lines[2].split()) == "LoRA weight modules rank scale alpha skipped rounding error"
    assert " ".join(lines[3].split()) == names("lora.safetensors", "0.5 1 2 2 stored", "0 keys", "0.0%")
    size = format_bytes(sum(path.stat().st_size for path in written))
    assert outcome.err.splitlines()[-1] == f"{len(written)} files, {size} written"
    says(f"{outcome.out}{without_progress(outcome.err)}")


def test_a_dry_run_as_json_writes_nothing(cli, models, lora, tmp_path):
    before = stamps(tmp_path / "work")
    outcome = cli(
        "merge-lora", "--base", models / TRANSFORMER, "--lora", lora, "--output-path", "out", "--dry-run", "--format", "json"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    content = json.loads(outcome.out)
    assert content["written"] is False and content["changed"] == 1
    assert content["loras"] == [
        {
            "path": "lora.safetensors", "weight": 1.0, "matched": 1, "unmatched": [], "ranks": [2], "scales": [2.0],
            "alpha": "stored",
        }
    ]  # fmt: skip
    assert stamps(tmp_path / "work") == before


def test_what_rounding_loses_is_warned_of(cli, says, models, lora):
    """bfloat16 has steps of 2^-11 at 0.0625 (2^-12 below); the change is a fifth of one."""
    path, tensors = shard_of_q(models)
    tensors[f"{Q}.weight"] = torch.full_like(tensors[f"{Q}.weight"], 0.0625).bfloat16()
    save_file(tensors, path)
    weight = 2**-11 / 5 / 0.125
    outcome = cli("merge-lora", "--base", models / TRANSFORMER, "--lora", f"{lora}:{weight}", "--output_path", "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err == names("warning:", "BF16", "100%", "--dtype float32")
    assert outcome.out.splitlines()[3].endswith("100.0%")
    says(f"{outcome.out}{without_progress(outcome.err)}")


def test_into_one_of_a_lower_rank(cli, says, lora):
    outcome = cli(
        "merge-lora", "--lora", lora, "--lora", f"{lora}:-0.5", "--rank", 1, "--output_path", "one.safetensors"
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "1 module of rank 1"
    assert lines[1] == names("rank 1", "0.000%") and "most" not in lines[1]
    says(f"{outcome.out}{without_progress(outcome.err)}")
    found = load_file("one.safetensors")
    stem = f"lora_unet_{Q.replace('.', '_')}"
    change = found[f"{stem}.lora_up.weight"] @ found[f"{stem}.lora_down.weight"]
    assert torch.allclose(change, torch.full_like(change, 0.5 * 0.125), atol=1e-6)
    assert found[f"{stem}.alpha"] == 1


def test_a_lower_rank_names_the_modules_that_lose_most(cli, lora):
    stem = f"lora_unet_{Q.replace('.', '_')}"
    tensors = load_file(lora)
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    down[1] = torch.linspace(-1, 1, down.shape[1])
    up[:, 1] = torch.linspace(-1, 1, len(up))
    save_file(tensors, "skewed.safetensors")
    whole = up @ down
    share = float(torch.linalg.svdvals(whole)[1:].norm() / whole.norm())
    assert share > 0.01
    outcome = cli("merge-lora", "--lora", "skewed.safetensors:0.5", "--lora", "skewed.safetensors:0.5", "--rank", 1, "--output_path", "one.safetensors")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[1] == names(f"rank 1 loses {share:.3%}", f"most: `{stem}` {share:.3%}")


def test_wrong_use(cli, refused, models, lora):
    base = ("--base", models / TRANSFORMER)
    out = ("--lora", lora, "--output_path", "out")
    assert refused(*base, *out, "--rank", 4) == (
        2,
        [(names("--rank", "cannot be used", "--base"), "remove one of them")],
    )
    assert refused(*out, "--max_shard_size", "5GB") == (
        2,
        [(names("--max_shard_size", "requires", "--base"), "remove it")],
    )
    assert refused(*out) == (2, [(names("--output_path", "out", "single file"), names(".safetensors"))])
    assert refused("--base", "gone", *out) == (
        1,
        [(names("--base", "gone", "does not exist"), names("model_id:file"))],
    )
    assert refused("--base", "Qwen/Gone:x*", *out) == (
        1,
        [(names("--base", "Qwen/Gone:x*", "does not exist", models), names("model_id:file"))],
    )


def test_a_shard_is_no_lora(cli, refused, models):
    path, _ = shard_of_q(models)
    message = names(path, "one shard")
    expected = (1, [(message, names("diffsynth split-ckpt --join"))])
    base = ("--base", models / TRANSFORMER, "--output_path", "out")
    assert refused(*base, "--lora", path) == expected
    assert refused("--lora", path, "--output_path", "one.safetensors") == expected
    outcome = cli("convert-lora", path, "--to", "kohya", "-o", "one.safetensors")
    assert (outcome.code, read_problems(outcome.err)) == expected


def test_unmatched_keys(cli, refused, models, lora):
    tensors = load_file(lora)
    tensors |= {f"lora_te_text_model_{number}.alpha": torch.tensor(1.0) for number in range(7)}
    save_file(tensors, lora)
    arguments = ("--base", models / TRANSFORMER, "--lora", lora, "--output_path", "out")
    listed = ", ".join(f"`lora_te_text_model_{number}.alpha`" for number in range(5))
    assert refused(*arguments) == (
        1,
        [
            (
                names("lora.safetensors", "7 of 10", "no module", "Qwen-Image", "7 of them", listed, "2 more"),
                names("--allow_unmatched"),
            )
        ],
    )
    outcome = cli("merge-lora", *arguments, "--allow-unmatched")
    assert outcome.code == 0, outcome.err
    assert outcome.err == names("warning: `lora.safetensors`", "7 keys", listed, "2 more")


def test_8_bit_floats_need_a_format(cli, refused, models, lora):
    path, tensors = shard_of_q(models)
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    assert refused("--base", models / TRANSFORMER, "--lora", lora, "--output_path", "out") == (
        1,
        [(names("1 weight", "F8_E4M3", f"{Q}.weight"), names("--dtype bfloat16"))],
    )


def test_nothing_is_written_over_the_base_or_unasked(cli, refused, models, lora):
    base = ("--base", models / TRANSFORMER, "--lora", lora)
    first = min((models / TRANSFORMER).glob("*.safetensors"))
    code, problems = refused(*base, "--output_path", models / TRANSFORMER, "--overwrite")
    assert code == 1
    assert problems[0] == (names(first, "overwrite", "input", first), names("--output_path"))
    assert cli("merge-lora", *base, "--output_path", "out").code == 0
    code, problems = refused(*base, "--output_path", "out")
    assert code == 1 and problems[0][0] == names(f"out/{first.name}", "already exists")
