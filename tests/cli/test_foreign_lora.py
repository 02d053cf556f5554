"""LoRAs and bases in the formats of other programs, and files that are not LoRAs: exact messages of the commands."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import read_problems, stamps
from tests.naming import names

TRANSFORMER = "Qwen/Qwen-Image/transformer"
Q = "transformer_blocks.0.attn.to_q"
STEM = f"lora_unet_{Q.replace('.', '_')}"
DOWN, UP, ALPHA = (f"{STEM}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
COMMANDS = {
    "merge": ("merge-lora", "--base", "{base}", "--lora", "{lora}", "--output_path", "out"),
    "sum": ("merge-lora", "--lora", "{lora}", "--output_path", "out.safetensors"),
    "convert": ("convert-lora", "{lora}", "--to", "diffusers", "--family", "qwen-image", "-o", "out.safetensors"),
}


@pytest.fixture
def weights(models: Path) -> dict[str, Tensor]:
    """The tensors of the tiny Qwen-Image."""
    return {
        name: t for file in sorted((models / TRANSFORMER).glob("*.safetensors")) for name, t in load_file(file).items()
    }


@pytest.fixture
def lora(weights) -> dict[str, Tensor]:
    """A LoRA of one module in the format of kohya."""
    rows, columns = weights[f"{Q}.weight"].shape
    return {DOWN: torch.full((2, columns), 0.125), UP: torch.full((rows, 2), 0.25), ALPHA: torch.tensor(2.0)}


@pytest.fixture
def refused(cli, says, models, tmp_path):
    """Run a command that must be rejected with one message, writing nothing."""

    def run(name: str, lora: object) -> tuple[str, str | None]:
        before = stamps(tmp_path / "work")
        outcome = cli(*(word.format(base=models / TRANSFORMER, lora=lora) for word in COMMANDS[name]))
        assert outcome.code == 1 and outcome.out == "" and "Traceback" not in outcome.err
        assert stamps(tmp_path / "work") == before
        says(f"exit code {outcome.code}\n{outcome.err}")
        (problem,) = read_problems(outcome.err)
        return problem

    return run


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("alpha", [torch.zeros(0), torch.ones(2), torch.ones(1, 1)], ids=["none", "two", "a matrix"])
def test_an_alpha_that_is_not_one_number(refused, lora, name, alpha):
    save_file(lora | {ALPHA: alpha}, "mine.safetensors")
    assert refused(name, "mine.safetensors") == (
        names("mine.safetensors", ALPHA, "single number"),
        "re-export the file",
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64")], ids=str
)
def test_halves_that_are_no_floats(refused, lora, name, dtype, stored):
    save_file(lora | {DOWN: lora[DOWN].to(dtype)}, "mine.safetensors")
    assert refused(name, "mine.safetensors") == (
        names("mine.safetensors", DOWN, stored, "expected a float"), "re-export the file"
    )  # fmt: skip


PEFT = [f"base_model.model.{Q}.lora_{half}.weight" for half in "AB"]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_peft_writes_needs_the_file_of_its_alphas(refused, lora, name):
    save_file({PEFT[0]: lora[DOWN], PEFT[1]: lora[UP]}, "mine.safetensors")
    assert refused(name, "mine.safetensors") == (
        names("mine.safetensors", "`base_model.model.`", "peft", "adapter_config.json", "missing"),
        names("adapter_config.json"),
    )


NO_SETTINGS = names("adapter_config.json", "not a LoRA config", "peft")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", names("adapter_config.json", "not valid JSON", "line 1", "column 2")),
        ("[]", names("adapter_config.json", "a list", "an object")),
        ("{}", NO_SETTINGS),
        ('{"peft_type": "LOHA", "lora_alpha": 4}', NO_SETTINGS),
        ('{"peft_type": "LORA", "lora_alpha": "much"}', NO_SETTINGS),
        ('{"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {"(": 4}}', NO_SETTINGS),
    ],
)
def test_settings_of_peft_that_are_none(refused, lora, text, message):
    save_file({PEFT[0]: lora[DOWN], PEFT[1]: lora[UP]}, "mine.safetensors")
    Path("adapter_config.json").write_text(text)
    reported, hint = refused("convert", "mine.safetensors")
    assert reported == message and hint == "re-export the file"


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, 2.0), ({"use_rslora": True}, 2.0 * 2**0.5), ({"alpha_pattern": {"to_q": 1}}, 0.5)]
)
def test_what_peft_writes_is_read_with_its_settings(cli, models, weights, lora, settings, scale):
    save_file({PEFT[0]: lora[DOWN], PEFT[1]: lora[UP]}, "mine.safetensors")
    Path("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}))
    outcome = cli(
        *(word.format(base=models / TRANSFORMER, lora="mine.safetensors") for word in COMMANDS["merge"]),
        "--dtype",
        "float32",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out == names("adapter_config.json")
    found = {name: t for file in Path("out").glob("*.safetensors") for name, t in load_file(file).items()}
    expected = weights[f"{Q}.weight"].float() + scale * lora[UP] @ lora[DOWN]
    assert torch.allclose(found[f"{Q}.weight"], expected, atol=1e-6)


STRANGE = "diffusion_model.blocks.0.norm3.diff_b"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("merge", names("mine.safetensors", "1 of 4", "no module", "Qwen-Image", STRANGE), names("--allow_unmatched")),
        ("sum", names("mine.safetensors", "1 of 4", "not a LoRA key", STRANGE), names("--base", "--allow_unmatched")),
        ("convert", names("mine.safetensors", "1 full-weight difference", "Qwen-Image dit", STRANGE), names("diffsynth merge-lora --base", "--allow_unmatched")),
    ],
)  # fmt: skip
def test_whole_differences_of_another_model_beside_a_lora(refused, lora, name, message, hint):
    save_file(lora | {STRANGE: torch.ones(4)}, "mine.safetensors")
    assert refused(name, "mine.safetensors") == (message, hint)


@pytest.mark.parametrize("name", ["merge", "sum"])
def test_a_folder_is_no_lora(refused, lora, name):
    Path("folder").mkdir()
    save_file(lora, "folder/mine.safetensors")
    assert refused(name, "folder") == (names("folder", "not a safetensors file"), names("pass the file"))


@pytest.mark.parametrize("text", ["abc", "", "0,5", "nan", "inf"])
def test_a_weight_that_is_no_number(refused, lora, text):
    save_file(lora, "mine.safetensors")
    assert refused("merge", f"mine.safetensors:{text}") == (
        names("--lora", f"mine.safetensors:{text}", "finite number"), names("0.8")
    )  # fmt: skip


def test_a_change_too_large_to_square_is_told_in_json(cli, models, lora):
    """1e30 squared exceeds float32, and JSON has no infinity."""
    save_file(lora, "mine.safetensors")
    outcome = cli(
        "merge-lora", "--base", models / TRANSFORMER, "--lora", "mine.safetensors:1e30", "--output_path", "out",
        "--format", "json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out, parse_constant=pytest.fail)["lost"] < 0.01


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_base_of_comfyui(cli, weights, lora, prefix):
    """Keys stay identical, tensors next to the transformer bit-identical; the change is that of the bare base."""
    beside = {"vae.encoder.conv_in.weight": torch.ones(2, 2), "text_encoders.a.weight": torch.ones(3)}
    save_file(weights, "bare.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()} | beside, "comfy.safetensors")
    save_file(lora, "mine.safetensors")
    for base in ("bare", "comfy"):
        outcome = cli(
            "merge-lora", "--base", f"{base}.safetensors", "--lora", "mine.safetensors", "--output_path", "out"
        )
        assert outcome.code == 0, outcome.err
    expected, found = load_file("out/bare.safetensors"), load_file("out/comfy.safetensors")
    assert not torch.equal(expected[f"{Q}.weight"], weights[f"{Q}.weight"])
    assert found.keys() == {prefix + name for name in weights} | beside.keys()
    assert all(torch.equal(found[prefix + name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in beside.items())
    outcome = cli(
        *(word.format(lora="mine.safetensors") for word in COMMANDS["convert"]), "--check", "comfy.safetensors"
    )
    assert outcome.code == 0, outcome.err
