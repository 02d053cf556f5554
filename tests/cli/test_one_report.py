"""Many mistakes at once: `diffsynth train` reports all of them together, in a rehearsal too."""

import pytest

from tests.conftest import ENTRIES

LORA_RNK = ("`lora_rnk` (command line) is not a parameter", "did you mean `lora_rank`?")
NO_FOLDER = (
    "the dataset folder `nowhere` (`dataset_base_path`) does not exist",
    "pass the folder with `--dataset_base_path`",
)
TO_QQ = ("`lora_target_modules`: no module of dit ends with `to_qq`", "did you mean `to_q`?")


@pytest.fixture
def occupied(cli, dataset):
    """An output folder with a finished run, and the resulting problem."""
    run = ("--max_steps", 1, "--dataset_num_workers", 0, "--device", "cpu", "--output_path", "out")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, *run)
    assert outcome.code == 0, outcome.err
    return (
        "`output_path` `out` already holds a run (completed, 1 of 1 steps)",
        "resume it with `--resume auto`, or choose another `--output_path`",
    )


def test_problems_of_every_kind(refuse, dataset, models, occupied):
    vae = models / "Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1000])
    (dataset / "metadata.csv").write_text("image,prompt\nastronaut.png,a\nmissing.png,b\n")
    code, problems = refuse(
        "--lora_rnk", 16, "--learning_rate", "abc", "--lora_target_modules", "to_qq,to_k", "--output_path", "out"
    )  # fmt: skip
    size = vae.stat().st_size - 8 - int.from_bytes(vae.read_bytes()[:8], "little")
    assert code == 2
    assert sorted(problems) == sorted(
        [
            LORA_RNK,
            ("`learning_rate` takes a number, got `abc` (`--learning_rate`)", None),
            (
                f"`{vae}` is truncated: its header declares {size + 1000} bytes of tensors, found {size}",
                "download the file again",
            ),
            TO_QQ,
            (
                f"`{dataset}/metadata.csv` row 2: column `image` names `{dataset}/missing.png`, which does not exist",
                "correct the path (relative to `dataset_base_path`), or remove the row",
            ),
            occupied,
        ]
    )


def test_faulty_files_alone_are_no_wrong_use(refuse, models):
    vae = models / "Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors"
    vae.write_bytes(b"")
    code, problems = refuse("--dataset_base_path", "nowhere")
    assert code == 1
    assert sorted(problems) == sorted(
        [
            NO_FOLDER,
            (
                f"`{vae}` (0 bytes) is not a valid safetensors file: cannot read its header",
                "download the file again",
            ),
        ]
    )


def test_an_unknown_name_in_a_config_hides_nothing(refuse, config):
    path = config("parameters:\n  lora_rnk: 16\n  lora_target_modules: to_qq\n")
    code, problems = refuse("--config", path, "--dataset_base_path", "nowhere")
    assert code == 2
    assert sorted(problems) == sorted(
        [(f"`lora_rnk` in `{path}` is not a parameter", "did you mean `lora_rank`?"), NO_FOLDER, TO_QQ]
    )


def test_all_that_is_wrong_in_one_config(refuse, config):
    path = config("bogus: 1\nextends: zzz\nparameters:\n  lora_rnk: 16\n")
    code, problems = refuse("--config", path)
    assert code == 2
    assert sorted(problems) == sorted(
        [
            (
                f"`{path}`: `bogus` is not a key of a recipe",
                "a recipe has the keys extends, description, family, parameters, stages",
            ),
            (
                f"`{path}` extends `zzz`, which is not a recipe; only recipes can be extended",
                "see `diffsynth recipe list`",
            ),
            (f"`lora_rnk` in `{path}` is not a parameter", "did you mean `lora_rank`?"),
        ]
    )


def test_an_unknown_recipe_hides_nothing(refuse, occupied):
    code, problems = refuse("--dataset_base_path", "nowhere", "--output_path", "out", recipe="qwen-image-lorra")
    assert code == 2
    assert sorted(problems) == sorted(
        [("there is no recipe `qwen-image-lorra`", "did you mean `qwen-image-lora`?"), NO_FOLDER, occupied]
    )


def test_a_rehearsal_reports_the_same(refuse):
    code, problems = refuse(
        "--rehearse", "--lora_rnk", 16, "--lora_target_modules", "to_qq", "--dataset_base_path", "nowhere"
    )
    assert code == 2
    assert sorted(problems) == sorted([LORA_RNK, NO_FOLDER, TO_QQ])


def test_a_rehearsal_of_an_unknown_family_reports_the_rest(refuse, config):
    path = config("family: qwen-imag\nparameters:\n  lora_rank: abc\n")
    code, problems = refuse("--rehearse", "--config", path)
    assert code == 2
    assert sorted(problems) == sorted(
        [
            ("unknown family `qwen-imag`", "did you mean `qwen-image`?"),
            (f"`lora_rank` takes an integer, got `abc` (`{path}`)", None),
        ]
    )


def test_a_rehearsal_of_a_damaged_file_reports_the_rest(refuse, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"short")
    code, problems = refuse("--rehearse", "--lora_rnk", 16, "--model_paths", f'["{damaged}"]')
    assert code == 2
    assert sorted(problems) == sorted(
        [
            LORA_RNK,
            (
                f"`{damaged}` (5 bytes) is not a valid safetensors file: cannot read its header",
                "download the file again",
            ),
        ]
    )


def test_a_rehearsal_tells_an_entry_that_names_nothing_once(refuse):
    entry = "Qwen/Qwen-Image:nothing/*.safetensors"
    message = f"`{entry}` is not a component of Qwen-Image that can be rehearsed"
    assert refuse("--rehearse", "--model_id_with_origin_paths", entry) == (
        2,
        [(message, "specify the files as a recipe does")],
    )


def test_dry_run_reports_as_the_run_does(refuse):
    assert refuse("--dry_run", "--lora_rnk", 16, "--dataset_base_path", "nowhere") == (2, [LORA_RNK, NO_FOLDER])


def test_combinations_that_cannot_work_are_told_together(refuse):
    code, problems = refuse(
        "--trainable_models", "text_encoder", "--fp8_models", ENTRIES["text_encoder"], "--task", "direct_distill",
        "--lora_base_model", "controlnet", "--preset_lora_model", "dit", "--zero_cond_t", "--num_frames", 5,
    )  # fmt: skip
    told = "\n".join(message for message, _ in problems)
    assert code == 2 and all(hint for _, hint in problems)
    for part in (
        "`num_frames` does not apply to qwen-image",
        "`trainable_models` names `text_encoder`, whose files `fp8_models` keeps in 8-bit floats",
        "`controlnet`",
        "`preset_lora_model` is set without `preset_lora_path`",
        "`zero_cond_t` requires the extra input `edit_image`",
        "`seed`",
    ):
        assert part in told, told
    print(told)
