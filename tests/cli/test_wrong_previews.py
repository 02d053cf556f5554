"""Previews that cannot be drawn are reported with the other problems; and what the plan says of them."""

import pytest

from tests.naming import names

OPTION = "--preview_prompts"


@pytest.mark.parametrize(
    ("flags", "code", "problem", "hint"),
    [
        (("--preview_every", 5), 2, names("preview_every", "preview_prompts"), names(OPTION)),
        (("--preview_steps", 5), 2, names("preview_steps", "preview_prompts"), names(OPTION)),
        ((OPTION, "gone.txt"), 2, names(OPTION, "gone.txt", "does not exist"), names("file with prompts")),
        ((OPTION, "a\udcff"), 1, names(OPTION, "U+DCFF"), names("remove it")),
        (
            (OPTION, "a cat", "--task", "sft:data_process"),
            2,
            names("preview_prompts", "VAE", "sft:data_process"),
            names(OPTION, "generate"),
        ),
        (
            (OPTION, "a cat", "--trainable_models", "dit,vae"),
            2,
            names("preview_prompts", "`vae` trains"),
            names(OPTION, "generate"),
        ),
    ],
)
def test_wrong_use_is_refused(refuse, flags, code, problem, hint):
    assert refuse(*flags) == (code, [(problem, hint)])


def test_faults_of_prompts_come_together_with_others(refuse, tmp_path):
    """An empty file, and images that the model does not take or that are missing."""
    (tmp_path / "p.txt").write_text("\n")
    code, problems = refuse(OPTION, tmp_path / "p.txt", "--lora_rank", 0)
    assert code == 2 and [message for message, _ in problems][1:] == [names(tmp_path / "p.txt", "no prompts")], problems
    (tmp_path / "p.csv").write_text("prompt,edit_image\na cat,gone.png\n")
    _, problems = refuse(OPTION, tmp_path / "p.csv")
    assert problems == [(names("row 1", "trains without `edit_image`"), names("--extra_inputs edit_image"))]


def test_images_that_the_model_requires(cli, dataset, recipe_models, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("qwen-image-edit-lora")))
    rows = ["image,prompt,edit_image", "chelsea.png,a cat,coffee.png"]
    (dataset / "metadata.csv").write_text("\n".join(rows))
    flags = ("--recipe", "qwen-image-edit-lora", "--device", "cpu", "--dataset_base_path", dataset, "--max_steps", 1)
    outcome = cli("train", *flags, "--dry_run", OPTION, "a cat")
    assert outcome.code == 2 and "draws from `edit_image`, and none is given" in outcome.err
    assert "add the column `edit_image`" in outcome.err and f"{OPTION} dataset" in outcome.err
    assert cli("train", *flags, "--dry_run", OPTION, "dataset").code == 0


def test_one_of_two_transformers_draws_nothing(cli, tiny_wan, photographs, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))
    flags = ("--recipe", "wan2.2-t2v-a14b-lora", "--device", "cpu", "--dataset_base_path", photographs)
    outcome = cli("train", *flags, "--dry_run", OPTION, "a cat")
    assert "draws with two transformers" in outcome.err and "diffsynth generate" in outcome.err


def test_the_plan_states_what_previews_cost(cli, photographs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na rocket\n")
    flags = ("--recipe", "qwen-image-lora", "--dataset_base_path", photographs, "--device", "cpu", "--max_steps", 5)
    previews = (OPTION, tmp_path / "prompts.txt", "--preview_every", 2, "--preview_steps", 3)
    planned = cli("train", *flags, *previews, "--dry_run")
    text = " ".join(planned.out.split())
    assert planned.code == 0, planned.err
    # Before the first step, after 2 and 4, and after 5: two images in three steps of two passes each.
    assert (
        "2 previews of 64 x 64 in 3 sampling steps each, before the first step, every 2 steps and after the last"
        in text
    )
    assert "48 forward passes" in text and "vae" in text
