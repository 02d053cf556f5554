"""`context_parallel`: other families, processes, attention and sizes: one report, before loading."""

from tests.cli.conftest import read_problems, without_progress
from tests.clips import detailed, write_clip
from tests.naming import names


def test_other_families_have_no_such_parameter(refuse):
    assert refuse("--context_parallel", 2) == (2, [(names("context_parallel", "qwen-image", "wan"), names("remove"))])


def test_all_that_does_not_go_with_it_is_in_one_report(cli, recipe_models, says, tmp_path, monkeypatch):
    recipe = "wan2.1-t2v-1.3b-lora"
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models(recipe)))
    write_clip(tmp_path / "a.mov", detailed(5, 32, 48))
    (tmp_path / "metadata.csv").write_text("video,prompt\na.mov,rain\n")
    size = ("--height", 32, "--width", 48, "--num_frames", 1)
    flags = ("--recipe", recipe, "--device", "cpu", "--dataset_base_path", tmp_path, *size)
    wrong = (
        "--context_parallel",
        4,
        "--attention",
        "flash",
        "--checkpointing",
        "keep_attention",
        "--mixed_precision",
        "bf16",
    )
    outcome = cli("train", *flags, *wrong)
    assert outcome.code == 2 and "Loading" not in outcome.err
    assert read_problems(outcome.err) == [
        (names("context_parallel", "multiple of 4 processes", "1 process"), names("--num_processes")),
        (names("attention", "flash"), names("--attention sdpa")),
        (names("keep_attention"), names("--checkpointing full")),
        (names("4", "2 attention heads"), names("pass 2")),
        (names("48 x 32 x 1 frames (6 tokens)"), names("pass 2", "--num_frames")),
    ]
    says(without_progress(outcome.err))


def test_a_rehearsal_computes_each_sample_in_its_one_process(cli):
    size = ("--height", 32, "--width", 32, "--num_frames", 1)
    outcome = cli(
        "train", "--recipe", "wan2.1-t2v-1.3b-lora", "--context_parallel", 2, "--rehearse", "--max_steps", 1, *size
    )
    assert outcome.code == 0, outcome.err
    assert names("The rehearsal computes each sample in one process", "context_parallel", "instead of 2") == outcome.err


def test_encoding_alone_needs_no_other_process(cli, recipe_models, tmp_path, monkeypatch):
    recipe = "wan2.1-t2v-1.3b-lora"
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models(recipe)))
    write_clip(tmp_path / "a.mov", detailed(5, 32, 48))
    (tmp_path / "metadata.csv").write_text("video,prompt\na.mov,rain\n")
    size = ("--height", 32, "--width", 48, "--num_frames", 1)
    flags = (
        "--recipe",
        recipe,
        "--device",
        "cpu",
        "--dataset_base_path",
        tmp_path,
        *size,
        "--task",
        "sft:data_process",
    )
    assert cli("train", *flags, "--context_parallel", 2, "--dry_run").code == 0
