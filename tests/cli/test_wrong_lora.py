"""Wrong LoRA parameters and files: all problems are reported together, before reading weights."""

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ENTRIES
from tests.loras import RANK, TinyFamily, random_lora, save_lora
from tests.naming import in_any_order, names

ALONE = names("--resume auto")
COMPONENTS = names("Qwen-Image", "dit", "text_encoder", "vae", "controlnet")
ANOTHER = names("pass a LoRA")
PRESET = ("--preset_lora_model", "dit", "--preset_lora_path")
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def qwen(tiny_families) -> TinyFamily:
    return tiny_families("qwen-image")


@pytest.fixture
def lora(qwen, tmp_path) -> Path:
    """A LoRA that fits the tiny model."""
    return save_lora(tmp_path / "lora.safetensors", random_lora(qwen.module_shapes()), "qwen-image", "diffsynth")


def rewrite(path: Path, **changes) -> None:
    """Remove keys (None) or add tensors, given as `module__suffix`."""
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize("parameter", ["lora_base_model", "preset_lora_model"])
@pytest.mark.parametrize(("name", "hint"), [("text_encodr", names("text_encoder")), ("zzz", COMPONENTS)])
def test_a_component_that_there_is_not(refuse, lora, parameter, name, hint):
    arguments = ["--preset_lora_path", lora] if parameter == "preset_lora_model" else []
    message = names(parameter, name, "not a component", "Qwen-Image")
    assert refuse(f"--{parameter}", name, *arguments) == (2, [(message, hint)])


@pytest.mark.parametrize("parameter", ["lora_base_model", "preset_lora_model", "trainable_models"])
def test_a_component_that_this_kind_of_model_has_not(refuse, tiny_wan, lora, monkeypatch, parameter):
    """Only image-to-video variants of Wan have an image encoder."""
    from tests.wan import T2V, entries

    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))
    arguments = ["--preset_lora_path", lora] if parameter == "preset_lora_model" else []
    code, problems = refuse(
        *entries(T2V), "--lora_base_model", "dit", f"--{parameter}", "image_encoder", *arguments, recipe=None
    )
    assert code == 2
    assert (names(parameter, "image_encoder", "Wan (text to video)"), "remove it") in problems


@pytest.mark.parametrize("parameter", ["lora_checkpoint", "preset_lora_path"])
def test_a_file_that_is_not_there(refuse, parameter):
    more = PRESET[:2] if parameter == "preset_lora_path" else ()
    message = names(parameter, "nowhere.safetensors", "does not exist")
    assert refuse(*more, f"--{parameter}", "nowhere.safetensors") == (1, [(message, "correct the path")])


@pytest.mark.parametrize("parameter", ["lora_checkpoint", "preset_lora_path"])
def test_a_file_that_is_damaged(refuse, lora, parameter):
    lora.write_bytes(lora.read_bytes()[:100])
    more = PRESET[:2] if parameter == "preset_lora_path" else ()
    message = names(lora, "100 bytes", "safetensors", "header")
    assert refuse(*more, f"--{parameter}", lora) == (1, [(message, names("download the file"))])


def test_a_preset_file_without_its_component(refuse, lora):
    message = names("preset_lora_path", "without", "preset_lora_model")
    assert refuse("--preset_lora_path", lora) == (2, [(message, names("--preset_lora_model dit"))])
    assert refuse("--preset_lora_path", lora, "--lora_base_model", "text_encoder", "--lora_target_modules", "q_proj") == (
        2, [(message, names("--preset_lora_model text_encoder"))]
    )  # fmt: skip


def test_a_preset_component_without_its_file(refuse):
    message = names("preset_lora_model", "without", "preset_lora_path")
    assert refuse("--preset_lora_model", "dit") == (2, [(message, names("set the LoRA"))])


def test_a_preset_of_another_component(refuse, lora):
    keys = len(load_file(lora))
    code, [(message, hint)] = refuse("--preset_lora_path", lora, "--preset_lora_model", "text_encoder")
    assert (code, hint) == (1, ANOTHER)
    assert message == names(lora, f"{keys} of {keys}", "no module", "transformer_blocks.0.")


@pytest.mark.parametrize("arguments", [("--lora_checkpoint",), PRESET])
@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({f"{TO_Q}.lora_B.default.weight": None}, names(TO_Q, "lora_A", "no lora_B"), "re-export the file"),
        ({f"{TO_Q}.lora_A.default.weight": (RANK, 5)}, names(TO_Q, "[32, 4] x [4, 5]", "not match", "[32, 32]"), ANOTHER),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(refuse, lora, arguments, change, message, hint):
    rewrite(lora, **{key: None if shape is None else torch.ones(shape) for key, shape in change.items()})
    expected = names(lora, message)
    assert refuse("--lora_rank", RANK, *arguments, lora) == (1, [(expected, hint)])


TEXT_ENCODER = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"


@pytest.mark.parametrize("arguments", [("--lora_checkpoint",), PRESET])
def test_a_lora_with_keys_of_a_text_encoder_names_the_command_that_leaves_them_out(
    refuse, cli, lora, dataset, arguments
):
    """The suggested command is run as printed, and its output file is accepted."""
    rewrite(lora, **{TEXT_ENCODER: torch.ones(RANK, 5)})
    without = lora.with_name("lora-dit.safetensors")
    command = f"diffsynth convert-lora {lora} --to diffsynth --family qwen-image --allow_unmatched -o {without}"
    message = names(lora, "1 of 43", "no module", TEXT_ENCODER)
    hint = names(command)
    assert refuse("--lora_rank", RANK, *arguments, lora) == (1, [(message, hint)])
    outcome = cli(*shlex.split(command)[1:])
    assert outcome.code == 0 and outcome.err == names("1 key skipped", TEXT_ENCODER), outcome.err
    outcome = cli(
        "train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run", "--lora_rank", RANK,
        *arguments, without,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("arguments", [("--lora_checkpoint",), PRESET])
def test_a_file_with_full_weights_beside_its_lora(refuse, lora, arguments):
    rewrite(lora, **{"pipe.text_encoder.model.norm.weight": torch.ones(3)})
    message = names(lora, "1 full weight", "text_encoder", "LoRA of dit")
    assert refuse("--lora_rank", RANK, *arguments, lora) == (1, [(message, ALONE)])


def test_a_checkpoint_without_a_component_that_receives_it(refuse, lora, config):
    path = config("extends: qwen-image-full\n")
    message = names("lora_checkpoint", "without", "lora_base_model")
    assert refuse("--config", path, "--lora_checkpoint", lora, recipe=None) == (
        2,
        [(message, names("--lora_base_model"))],
    )


def test_a_checkpoint_of_another_rank(refuse, lora):
    message = names(lora, f"rank {RANK}", "lora_rank", 8)
    assert refuse("--lora_checkpoint", lora, "--lora_rank", 8) == (2, [(message, names(f"--lora_rank {RANK}"))])


def test_a_preset_of_any_rank_is_taken(cli, lora, dataset):
    outcome = cli(
        "train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--lora_rank", 8, *PRESET, lora, "--dry_run", "-v"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.out == names(lora, "merged into 21 modules", "LoRA of rank 8", "21 modules")


def test_a_wrong_rank_alone_is_the_problem(refuse, lora):
    """If the rank is invalid, the file is not compared with the default one."""
    message = names("lora_rank", "an integer", "at least", 1, 0, "--lora_rank")
    assert refuse("--lora_checkpoint", lora, "--lora_rank", 0) == (2, [(message, None)])


def test_real_files_fit_no_rehearsal(refuse, lora):
    hint = names("remove it")
    assert refuse("--rehearse", "--lora_checkpoint", lora, *PRESET, lora) == (
        2,
        [
            (names("lora_checkpoint", "cannot be rehearsed"), hint),
            (names("preset_lora_path", "cannot be rehearsed"), hint),
        ],
    )


def test_all_at_once(refuse, lora):
    code, problems = refuse(
        "--lora_target_modules", "to_(q", "--lora_checkpoint", "nowhere.safetensors", "--preset_lora_path", lora,
        "--lora_format", "civitai",
    )  # fmt: skip
    assert code == 2
    assert problems == in_any_order(
        (names("lora_target_modules", "to_(q", "no module", "regular expression", "position 3"), "fix it"),
        (names("lora_checkpoint", "nowhere.safetensors", "does not exist"), "correct the path"),
        (names("preset_lora_path", "without", "preset_lora_model"), names("--preset_lora_model dit")),
        (names("lora_format", "diffsynth", "diffusers", "comfyui", "kohya", "civitai", "--lora_format"), None),
    )


def test_the_plan_tells_what_was_chosen(cli, says, dataset):
    arguments = ("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run", "-v")
    automatic = cli(*arguments, "--lora_target_modules", "")
    assert automatic.out == names("LoRA of rank 32", "24 modules")
    assert automatic.out == names(24, "transformer_blocks.*", "attn.add_k_proj")
    assert "img_mlp.net.0.proj" in automatic.out and "excluded: 4 LoRA modules" in automatic.out
    pattern = cli(*arguments, "--lora_target_modules", ".*attn.to_[qk]")
    assert pattern.out == names(".*attn.to_[qk]", 4, "transformer_blocks.*", "attn.to_k", "attn.to_q")
    assert "LoRA is applied to" not in cli(*arguments).out
    for outcome in (automatic, pattern):
        says("\n".join(line for line in outcome.out.splitlines() if "LoRA" in line))


def test_an_automatic_choice_rehearses(cli):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--lora_target_modules", "", "--max_steps", 2)
    assert outcome.code == 0, outcome.err
    assert outcome.out == names("48 keys", "24 modules", "dit")
    assert "--lora_target_modules ''" in outcome.out


def test_a_preset_is_not_merged_into_8_bit_floats(refuse, lora):
    code, [(message, hint)] = refuse(*PRESET, lora, "--fp8_models", ENTRIES["dit"])
    assert code == 2
    assert message == names("preset_lora_path", "cannot be merged", "dit", "fp8_models")
    assert hint == names("fp8_models")


def test_a_preset_is_merged_beside_8_bit_floats(cli, lora, dataset):
    arguments = (
        "train",
        "--recipe",
        "qwen-image-lora",
        "--dataset_base_path",
        dataset,
        "--dry_run",
        "-v",
        *PRESET,
        lora,
    )
    outcome = cli(*arguments, "--fp8_models", ENTRIES["text_encoder"])
    assert outcome.code == 0, outcome.err
    assert "merged into 21 modules" in outcome.out


def test_modules_that_carry_no_lora(refuse):
    """Recognized by type, not by shape: an embedding, and a convolution with its own padding."""
    embedding = names("lora_target_modules", "matches modules", "text_encoder", "Embedding")
    assert refuse("--lora_base_model", "text_encoder", "--lora_target_modules", "q_proj,embed_tokens") == (
        2, [(names(embedding, "model.language_model.embed_tokens"), "use linear layers or plain convolutions")]
    )  # fmt: skip
    code, [(message, _)] = refuse("--lora_base_model", "vae", "--lora_target_modules", "encoder.conv_in")
    assert code == 2
    assert message == (
        names("lora_target_modules", "matches modules", "vae", "QwenImageCausalConv3d", "encoder.conv_in")
    )


@pytest.fixture
def flux(models, tiny_families, monkeypatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_families("flux").base))


@pytest.mark.usefixtures("flux")
def test_modules_that_are_of_another_kind_in_files(refuse):
    arguments = (
        "--lora_base_model",
        "vae",
        "--lora_target_modules",
        "encoder.mid.attn_1.q",
        "--lora_format",
        "diffsynth",
    )
    code, problems = refuse(*arguments, "--height", 64, "--width", 64, recipe="flux.1-dev-lora")
    assert (code, problems) == (
        2,
        [
            (
                names("lora_target_modules", "vae", "convolutions", "linear", "encoder.mid.attn_1.q"),
                names("use linear layers"),
            )
        ],
    )


@pytest.mark.usefixtures("flux")
def test_the_format_of_a_lora_where_none_trains(refuse):
    message = names("align_to_opensource_format", "without", "lora_base_model")
    sizes = ("--height", 64, "--width", 64)
    assert refuse("--align_to_opensource_format", *sizes, recipe="flux.1-dev-full") == (2, [(message, "remove it")])


@pytest.mark.usefixtures("flux")
def test_parts_of_a_vae_by_their_documented_names(refuse):
    def printed(*arguments: str):
        code, problems = refuse("--lora_format", "diffsynth", *arguments, recipe="flux.1-dev-lora")
        assert code == 2
        return problems

    message = names("{parameter}", "vae_decoder", "not a component", "FLUX.1")
    assert printed("--trainable_models", "vae_decoder") == [
        (message.format(parameter="trainable_models"), names("vae.decoder"))
    ]
    assert printed("--lora_base_model", "vae_decoder") == [(message.format(parameter="lora_base_model"), names("vae"))]
    assert printed("--remove_prefix_in_ckpt", "pipe.vae_encoder.") == [
        (names("remove_prefix_in_ckpt", "no key", "FLUX.1", "pipe.vae_encoder."), names("pipe.vae.encoder."))
    ]


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [
        ("pipe.dti.", names("pipe.dit.")),
        ("model", names("pipe.dit.", "pipe.text_encoder.", "pipe.vae.", "pipe.controlnet.")),
    ],
)
def test_a_prefix_that_no_key_has(refuse, prefix, hint):
    message = names("remove_prefix_in_ckpt", "no key", "Qwen-Image", prefix)
    assert refuse("--remove_prefix_in_ckpt", prefix) == (2, [(message, hint)])


def test_modules_passed_over_are_told(cli, dataset):
    """A list for more blocks than the transformer has, as the list of klein 4B is for the 9B."""
    arguments = ("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run", "-v")
    outcome = cli(*arguments, "--lora_target_modules", "transformer_blocks.0.attn.to_q,to_k")
    assert outcome.out == names("no LoRA", "1 module", "transformer_blocks.1.attn.to_q")
    assert "no LoRA on" not in cli(*arguments).out


def test_a_rehearsal_keeps_a_component_without_a_file_a_problem(cli):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--dry_run", "--preset_lora_model", "dit")
    assert outcome.code == 2
    assert "`preset_lora_model`" in outcome.err and "`preset_lora_path`" in outcome.err
