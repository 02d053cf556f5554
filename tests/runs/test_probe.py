"""A probe measures the largest micro-batches, prints what the run takes, and leaves nothing behind."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.naming import names

COMMON = (
    "train",
    "--recipe",
    "qwen-image-lora",
    "--dataset_num_workers",
    "0",
    "--lora_rank",
    "2",
    "--output_path",
    "out",
)


@pytest.fixture
def images(photographs, tmp_path):
    """The photographs, and one that is larger."""
    folder = Path(shutil.copytree(photographs, tmp_path / "images"))
    (folder / "metadata.csv").unlink()
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a photograph")
    Image.open(folder / "chelsea.png").resize((96, 64)).save(folder / "large.png")
    (folder / "large.txt").write_text("a large cat")
    return folder


def test_a_probe_measures_and_writes_no_run(cli, images, tmp_path):
    flags = (
        "--dataset_base_path",
        images,
        "--cache_path",
        "cache",
        "--batch_size",
        2,
        "--dataset_repeat",
        1,
        "--num_epochs",
        1,
    )
    outcome = cli(*COMMON, *flags, "--probe", 3, "--price_per_hour", 3600, "--gradient_accumulation_steps", 2)
    assert outcome.code == 0, outcome.err
    probed, speed, text, latents, run, cost, memory = outcome.out.splitlines()
    assert probed == names("Probed", "3 steps of 2 x 64 x 64 per micro-batch")
    assert speed == names("Speed", " s a step", " samples/s")
    assert run == names("Run", "about", "for 2 steps and encoding at this speed")
    assert text == names("Encoding", "samples/s of text; 1 more takes about", " s")
    assert latents == names("Encoding", "samples/s of latents; 3 more take about", " s")
    each = float(speed.split()[1])
    assert float(cost.split()[1]) > 2 * each, "a second costs 1, and saving takes some"
    assert float(speed.split()[5]) == pytest.approx(4 / each, rel=0.02), "two micro-batches a step"
    assert memory == names("Memory", "not measured on a CPU; the estimate is", "MiB")
    assert "Encoding latents: 2 of 2 samples" in outcome.err, "only those of the largest micro-batch"
    assert not (tmp_path / "out").exists() and list(Path().rglob("*.safetensors")) != []
    assert not [path for path in Path().rglob("*.safetensors") if "cache" not in path.parts]


def test_what_a_probe_cannot_do_is_told_at_once(cli, photographs):
    flags = ("--dataset_base_path", photographs, "--probe", 3, "--resume", "auto", "--dry_run")
    outcome = cli(*COMMON, *flags)
    assert outcome.code == 2 and "2 problems" in outcome.err
    assert outcome.err == names("`resume` goes on with a run") and outcome.err == names("`dry_run` loads no weights")
    assert outcome.err == names("remove `--resume` or `--probe`")
    rehearsed = cli(*COMMON, "--probe", 3, "--rehearse")
    assert rehearsed.code == 2 and rehearsed.err == names("`rehearse` trains tiny weights")
    encoding = cli(*COMMON, "--dataset_base_path", photographs, "--probe", 3, "--task", "sft:data_process")
    assert encoding.code == 2 and encoding.err == names("sft:data_process", "no steps")
