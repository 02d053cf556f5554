"""`diffsynth convert-lora`: its output, and inputs that it rejects without writing anything."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import HubAccessError, read_problems, stamps, without_progress
from tests.conftest import MODEL_ID, PLACES
from tests.naming import names

Q, K, V = (f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
OUT = "transformer_blocks.0.attn.to_out.0"
KOHYA = ("--to", "kohya")
FLUX2 = (*KOHYA, "--family", "flux2")
Save = Callable[..., Path]


def halves(module: str, rank: int = 2, rows: int = 6, value: float = 1.0) -> dict[str, Tensor]:
    """A LoRA in the format of diffusers."""
    stem = f"transformer.{module}"
    return {f"{stem}.lora_A.weight": torch.full((rank, 6), value), f"{stem}.lora_B.weight": torch.ones(rows, rank)}


def down_up(stem: str, alpha: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A LoRA in the format of kohya."""
    return {
        f"{stem}.lora_down.weight": torch.ones(2, 6, dtype=dtype),
        f"{stem}.lora_up.weight": torch.ones(6, 2, dtype=dtype),
        f"{stem}.alpha": torch.tensor(alpha),
    }


MODULATION = "lora_unet_transformer_blocks_0_img_mod_1"
ENCODER = down_up("lora_te_text_model_encoder_layers_0_mlp_fc1", 1.0)
SEPARATE = {key: tensor for n, part in enumerate((Q, K, V, OUT)) for key, tensor in halves(part, value=n + 1.0).items()}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write `mine.safetensors` to the working folder."""

    def write(tensors: dict[str, Tensor], **metadata: str) -> Path:
        path = tmp_path / "work" / "mine.safetensors"
        save_file(tensors, path, metadata or None)
        return path

    return write


@pytest.fixture
def convert(cli, says) -> Callable[..., tuple[str, list[str]]]:
    """Convert `mine.safetensors` to `out.safetensors`; return stdout, and the lines of stderr without progress."""

    def run(*arguments: object) -> tuple[str, list[str]]:
        outcome = cli("convert-lora", "mine.safetensors", "-o", "out.safetensors", *arguments)
        assert outcome.code == 0, outcome.err
        says(f"{outcome.out}{without_progress(outcome.err)}")
        return outcome.out, [line for line in outcome.err.splitlines() if not line.startswith("Writing")]

    return run


@pytest.fixture
def refuse(cli, says, tmp_path: Path) -> Callable[..., HubAccessError]:
    """Run `convert`, which must reject the input and write nothing."""

    def run(*arguments: object) -> HubAccessError:
        before = stamps(tmp_path)
        outcome = cli("convert-lora", "mine.safetensors", "-o", "out.safetensors", *arguments)
        assert outcome.code != 0 and outcome.out == "" and "Traceback" not in outcome.err, outcome
        assert stamps(tmp_path) == before
        says(f"exit code {outcome.code}\n{outcome.err}")
        return outcome.code, read_problems(outcome.err)

    return run


def test_modules_that_become_one_raise_the_rank_and_it_is_said(save, convert):
    save(SEPARATE)
    assert convert(*FLUX2) == (
        "out.safetensors  6 tensors  1.4 kB\n",
        [
            names("mine.safetensors", "FLUX.2 dit", "diffusers -> kohya", "4 modules read", "2 written"),
            names("rank increased", "1 module", "double_blocks.0.img_attn.qkv", "2 + 2 + 2 -> 6"),
            "1 file, 1.4 kB written",
        ],
    )
    tensors = load_file("out.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert torch.equal(tensors[f"{stem}.lora_down.weight"], torch.tensor([1.0, 1, 2, 2, 3, 3])[:, None].expand(6, 6))
    assert torch.equal(tensors[f"{stem}.lora_up.weight"], torch.block_diag(*[torch.ones(6, 2)] * 3))
    assert tensors[f"{stem}.alpha"] == 6 and tensors["lora_unet_double_blocks_0_img_attn_proj.alpha"] == 2


def test_modules_with_one_lora_a_become_one_of_the_same_rank(save, convert):
    save({key: tensor for part in (Q, K, V) for key, tensor in halves(part).items()})
    assert convert(*FLUX2)[1][1:] == [f"1 file, {Path('out.safetensors').stat().st_size} B written"]
    assert load_file("out.safetensors")["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (18, 2)


def test_where_a_part_has_no_lora_its_rows_are_zero(save, convert):
    save(halves(Q) | halves(V))
    convert(*FLUX2)
    up = load_file("out.safetensors")["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert torch.equal(up, torch.cat([torch.ones(6, 2), torch.zeros(6, 2), torch.ones(6, 2)]))


@pytest.mark.parametrize(
    ("dtype", "alpha", "reported", "written"),
    [
        (torch.float32, 1.0, "0.5, exactly", torch.float32),
        (torch.bfloat16, 1.0, "0.5, exactly", torch.bfloat16),
        (torch.float16, 1.0, "0.5, exactly", torch.float32),
        (torch.float32, 0.3, "0.15, in float32, rounded once", torch.float32),
        (torch.bfloat16, 0.3, "0.15, in float32, rounded once", torch.float32),
    ],
)
def test_a_scale_is_multiplied_in_where_no_alpha_is_read(save, convert, dtype, alpha, reported, written):
    """float16 has too few exponents for every scale."""
    save(down_up(MODULATION, alpha, dtype))
    _, lines = convert("--to", "diffusers")
    assert lines[1] == names("no alpha", "lora_B", "1 module", reported)
    tensors = load_file("out.safetensors")
    assert tensors.keys() == {f"transformer.transformer_blocks.0.img_mod.1.lora_{half}.weight" for half in "AB"}
    up = tensors["transformer.transformer_blocks.0.img_mod.1.lora_B.weight"]
    assert up.dtype == written and torch.equal(
        up, torch.full((6, 2), torch.tensor(alpha).double().item() / 2).to(written)
    )


def test_the_settings_of_peft_are_a_scale_too(save, convert):
    settings = {"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_out.0": 1}}
    save(halves(Q) | halves(OUT), lora_adapter_metadata=json.dumps(settings), family="qwen-image", author="me")
    convert(*KOHYA)
    tensors = load_file("out.safetensors")
    assert tensors["lora_unet_transformer_blocks_0_attn_to_q.alpha"] == 8
    assert tensors["lora_unet_transformer_blocks_0_attn_to_out_0.alpha"] == 1
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {
            "author": "me", "family": "qwen-image", "lora_component": "dit", "lora_format": "kohya",
            "removed_prefix": "pipe.dit.",
        }  # fmt: skip


def test_programs_are_told_the_same(save, convert):
    save(down_up(MODULATION, 0.3) | ENCODER)
    reported = json.loads(convert("--to", "diffsynth", "--allow-unmatched", "--format", "json", "--dry-run")[0])
    assert not reported["written"] and not Path("out.safetensors").exists()
    assert {key: reported[key] for key in ("family", "component", "from", "to", "modules", "ranks")} == {
        "family": "qwen-image", "component": "dit", "from": "kohya", "to": "diffsynth",
        "modules": {"read": 1, "written": 1}, "ranks": {"read": [2], "written": [2]},
    }  # fmt: skip
    assert reported["left_out"] == sorted(ENCODER) and reported["rounded"] == ["transformer_blocks.0.img_mod.1"]


def test_a_file_of_the_second_expert_is_read_by_its_prefix(save, convert):
    save({f"pipe.dit2.blocks.0.self_attn.q.lora_{half}.default.weight": torch.ones(2, 2) for half in "AB"})
    assert convert("--to", "diffusers")[1][0] == names(
        "mine.safetensors", "Wan dit2", "diffsynth -> diffusers", "1 module read", "1 written"
    )
    assert set(load_file("out.safetensors")) == {f"transformer.blocks.0.attn1.to_q.lora_{half}.weight" for half in "AB"}


LOKR = {"lora_unet_transformer_blocks_0_img_mod_1.lokr_w1": torch.ones(1)}
FULL = {"pipe.text_encoder.norm.weight": torch.ones(1)}
MISFIT = {key: tensor[:1] if "lora_A" in key else tensor for key, tensor in halves(Q).items()}
THIRDS = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 6),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(4, 2),
}
"""Four rows for three parts, which cannot be split evenly."""
REFUSED = [
    (
        halves(Q), KOHYA, 1,
        names("mine.safetensors", "qwen-image", "flux", "flux2"), names("--family", "qwen-image, flux, flux2"),
    ),
    (
        down_up(MODULATION, 1.0) | ENCODER, KOHYA, 1,
        names("mine.safetensors", "3 of 6", "no module", "Qwen-Image dit", *sorted(ENCODER), "3 of them", "text encoder"),
        names("--allow_unmatched"),
    ),
    (
        {"a.weight": torch.ones(1)}, KOHYA, 1,
        names("mine.safetensors", "its only key", "Qwen-Image", "Wan", "FLUX.1", "FLUX.2", "a.weight"),
        "pass a LoRA file",
    ),
    (
        ENCODER, (*KOHYA, "--allow_unmatched", "--family", "wan"), 1,
        names("mine.safetensors", "its 3 keys", "Wan", *sorted(ENCODER)),
        names("pass a LoRA"),
    ),
    (
        LOKR, KOHYA, 1,
        names("mine.safetensors", "LoKr", "not supported", "lora_unet_transformer_blocks_0_img_mod_1.lokr_w1"),
        names("extract a plain LoRA"),
    ),
    (
        halves(Q) | FULL, FLUX2, 1,
        names("mine.safetensors", "1 of 3", "no module", "FLUX.2 dit", "pipe.text_encoder.norm.weight"),
        names("diffsynth split-ckpt"),
    ),
    (
        dict([*halves(Q).items()][:1]), FLUX2, 1,
        names("mine.safetensors", "transformer_blocks.0.attn.to_q", "lora_A", "no lora_B"), "re-export the file",
    ),
    (
        MISFIT, FLUX2, 1,
        names("mine.safetensors", "lora_B", "lora_A", "transformer_blocks.0.attn.to_q", "not match", "[6, 2]", "[1, 6]"),
        "re-export the file",
    ),
    (
        halves(Q, value=float("nan")), FLUX2, 1,
        names("mine.safetensors", "1 tensor", "NaN or Inf", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        names("use an earlier"),
    ),
    (
        halves(Q) | halves(K, rows=4), FLUX2, 1,
        names("mine.safetensors", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", "not match", "lora_B has 6, 4 rows", "lora_A 6 columns"),
        names("--family"),
    ),
    (
        down_up("lora_unet_double_blocks_0_img_attn_proj", 1.0)
        | THIRDS,
        ("--to", "diffusers", "--family", "flux2"), 1,
        names("mine.safetensors", "lora_B", "double_blocks.0.img_attn.qkv", "4 rows", "cannot be split", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"),
        names("--family"),
    ),
    (
        halves(Q), (*KOHYA, "--family", "sdxl"), 2,
        names("unknown family", "sdxl"), names("qwen-image", "wan", "flux", "flux2"),
    ),
    (
        halves(Q), (*FLUX2, "--component", "vae"), 2,
        names("vae", "cannot be renamed", "no LoRA", "FLUX.2"), "pass a LoRA of dit",
    ),
    (
        halves(Q), (*FLUX2, "--component", "dit2"), 2,
        names("dit2", "cannot be renamed", "no LoRA", "FLUX.2"), "pass a LoRA of dit",
    ),
    (
        halves(Q), (*FLUX2, "-o", "out.bin"), 2,
        names("out.bin", "not end", ".safetensors"), names(".safetensors"),
    ),
    (
        halves(Q), (*FLUX2, "-o", "mine.safetensors", "--overwrite"), 1,
        names("mine.safetensors", "overwrite", "input", "mine.safetensors"), names("--output_path"),
    ),
    (
        halves(Q), (*FLUX2, "--check", "base.safetensors"), 1,
        names("--check", "base.safetensors", "does not exist"), names("model_id:file"),
    ),
]  # fmt: skip
"""(tensors, arguments, exit code, message, hint)."""
FAULTS = [
    "several families", "keys of a text encoder", "no LoRA", "another family", "LoKr", "full weights", "one half",
    "halves apart", "NaN", "parts apart", "rows that do not divide", "unknown family", "vae", "dit2", "not safetensors",
    "its own input", "no base",
]  # fmt: skip
"""What is wrong with each of them."""


@pytest.mark.parametrize(("tensors", "arguments", "code", "message", "hint"), REFUSED, ids=FAULTS)
def test_refused(save, refuse, tensors, arguments, code, message, hint):
    save(tensors)
    assert refuse(*arguments) == (code, [(message, hint)])


def test_a_file_that_contradicts_the_command_is_refused(save, refuse):
    save(halves(Q), family="flux2")
    assert refuse(*KOHYA, "--family", "wan")[1] == [
        (names("mine.safetensors", "flux2", "--family", "wan"), names("remove `--family`"))
    ]


# Against a base

BASE = f"{MODEL_ID}:{PLACES['dit']}"


def sides_of(module: str, models: Path) -> tuple[int, int]:
    (path,) = sorted((models / MODEL_ID / "transformer").glob("*.safetensors"))[:1]
    with safe_open(path, "pt") as file:
        return tuple(file.get_slice(f"{module}.weight").get_shape())


def test_a_base_proves_both_files(save, convert, tiny_models):
    rows, columns = sides_of(Q, tiny_models)
    stem = f"transformer.{Q}"
    save(
        {f"{stem}.lora_A.weight": torch.ones(2, columns), f"{stem}.lora_B.weight": torch.ones(rows, 2)},
        family="qwen-image",
    )
    assert convert(*KOHYA, "--check", BASE)[1][1] == names("every key", BASE, "before and after")


@pytest.mark.parametrize(
    ("module", "family", "expected"),
    [
        (Q, "qwen-image", names("transformer_blocks.0.attn.to_q", "[6, 2] x [2, 6]", "not match")),
        (
            Q.replace("0", "77"),
            "qwen-image",
            names("2 of 2", "no module", f"transformer.{Q.replace('0', '77')}.lora_A.weight"),
        ),
        (Q, "flux2", names("Qwen-Image diffusion transformer", "FLUX.2 dit")),
    ],
)
def test_a_base_that_does_not_fit_is_told(save, refuse, module, family, expected):
    save(halves(module), family=family)
    code, ((message, _),) = refuse(*KOHYA, "--check", BASE)
    assert code == 1 and message == expected


def test_no_torch_is_needed(cli, save):
    """Not even to apply a scale."""
    path = save(down_up(MODULATION, 0.3))
    code = (
        "import sys; from diffsynth_cli.main import main\n"
        f"code = main(['convert-lora', {str(path)!r}, '--to', 'diffusers', '-o', {str(path.with_name('o.safetensors'))!r}])\n"
        "print(code, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1:] == ["0 False"]
