"""Many mistakes at once: `diffsynth train` reports all of them together, in a rehearsal too."""

import pytest

from tests.conftest import ENTRIES
from tests.naming import in_any_order, names

LORA_RNK = (names("lora_rnk", "not a parameter"), names("lora_rank"))
NO_FOLDER = (names("nowhere", "dataset_base_path", "does not exist"), names("--dataset_base_path"))
TO_QQ = (names("lora_target_modules", "no module", "dit", "to_qq"), names("to_q"))


@pytest.fixture
def occupied(cli, dataset):
    """An output folder with a finished run, and the resulting problem."""
    run = ("--max_steps", 1, "--dataset_num_workers", 0, "--device", "cpu", "--output_path", "out")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, *run)
    assert outcome.code == 0, outcome.err
    return (
        names("output_path", "out", "already holds a run", "completed, 1 of 1 step"),
        names("--resume auto", "--output_path"),
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
    assert problems == in_any_order(
        LORA_RNK,
        (names("learning_rate", "a number", "abc", "--learning_rate"), None),
        (names(vae, "truncated", "header", f"{size + 1000} bytes", size), names("download the file")),
        TO_QQ,
        (
            names(f"{dataset}/metadata.csv", "row 2", "image", "missing.png", "does not exist"),
            names("correct the path", dataset),
        ),
        occupied,
    )


def test_faulty_files_alone_are_no_wrong_use(refuse, models):
    vae = models / "Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors"
    vae.write_bytes(b"")
    code, problems = refuse("--dataset_base_path", "nowhere")
    assert code == 1
    assert problems == in_any_order(
        NO_FOLDER, (names(vae, "0 bytes", "safetensors", "header"), names("download the file"))
    )


def test_an_unknown_name_in_a_config_hides_nothing(refuse, config):
    path = config("parameters:\n  lora_rnk: 16\n  lora_target_modules: to_qq\n")
    code, problems = refuse("--config", path, "--dataset_base_path", "nowhere")
    assert code == 2
    assert problems == in_any_order((names("lora_rnk", path, "not a parameter"), names("lora_rank")), NO_FOLDER, TO_QQ)


def test_all_that_is_wrong_in_one_config(refuse, config):
    path = config("bogus: 1\nextends: zzz\nparameters:\n  lora_rnk: 16\n")
    code, problems = refuse("--config", path)
    assert code == 2
    assert problems == in_any_order(
        (names(path, "bogus", "not a key"), names("extends", "description", "family", "parameters", "stages")),
        (names(path, "zzz", "not a recipe"), names("diffsynth recipe list")),
        (names("lora_rnk", path, "not a parameter"), names("lora_rank")),
    )


def test_an_unknown_recipe_hides_nothing(refuse, occupied):
    code, problems = refuse("--dataset_base_path", "nowhere", "--output_path", "out", recipe="qwen-image-lorra")
    assert code == 2
    assert problems == in_any_order(
        (names("no recipe", "qwen-image-lorra"), names("qwen-image-lora")), NO_FOLDER, occupied
    )


def test_a_rehearsal_reports_the_same(refuse):
    code, problems = refuse(
        "--rehearse", "--lora_rnk", 16, "--lora_target_modules", "to_qq", "--dataset_base_path", "nowhere"
    )
    assert code == 2
    assert problems == in_any_order(LORA_RNK, NO_FOLDER, TO_QQ)


def test_a_rehearsal_of_an_unknown_family_reports_the_rest(refuse, config):
    path = config("family: qwen-imag\nparameters:\n  lora_rank: abc\n")
    code, problems = refuse("--rehearse", "--config", path)
    assert code == 2
    assert problems == in_any_order(
        (names("unknown family", "qwen-imag"), names("qwen-image")),
        (names("lora_rank", "an integer", "abc", path), None),
    )


def test_a_rehearsal_of_a_damaged_file_reports_the_rest(refuse, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"short")
    code, problems = refuse("--rehearse", "--lora_rnk", 16, "--model_paths", f'["{damaged}"]')
    assert code == 2
    assert problems == in_any_order(
        LORA_RNK, (names(damaged, "5 bytes", "safetensors", "header"), names("download the file"))
    )


def test_a_rehearsal_tells_an_entry_that_names_nothing_once(refuse):
    entry = "Qwen/Qwen-Image:nothing/*.safetensors"
    message = names(entry, "not a component", "Qwen-Image", "rehearsed")
    assert refuse("--rehearse", "--model_id_with_origin_paths", entry) == (2, [(message, names("as a recipe"))])


def test_dry_run_reports_as_the_run_does(refuse):
    assert refuse("--dry_run", "--lora_rnk", 16, "--dataset_base_path", "nowhere") == (2, [LORA_RNK, NO_FOLDER])


def test_combinations_that_cannot_work_are_told_together(refuse):
    code, problems = refuse(
        "--trainable_models", "text_encoder", "--fp8_models", ENTRIES["text_encoder"], "--task", "direct_distill",
        "--lora_base_model", "controlnet", "--preset_lora_model", "dit", "--zero_cond_t", "--num_frames", 5,
    )  # fmt: skip
    reported = "\n".join(message for message, _ in problems)
    assert code == 2 and all(hint for _, hint in problems)
    for part in (
        names("num_frames", "not apply", "qwen-image"),
        names("trainable_models", "text_encoder", "fp8_models", "8-bit floats"),
        names("controlnet"),
        names("preset_lora_model", "without", "preset_lora_path"),
        names("zero_cond_t", "requires", "edit_image"),
        names("seed"),
    ):
        assert reported == part
