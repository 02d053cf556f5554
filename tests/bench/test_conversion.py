"""What commands that write weight files cost: wall time over that of `cp` of the same files, and memory.

`cp` ends when the copies are in the page cache, from which the system goes on to write them; the commands end when
their files are on the disk, for only then do they give them their names. So the fair measure is `cp` and `sync` of its
copies, which is what is asserted; the ratio to `cp` alone is printed beside it and says how fast the disk is.
"""

import os
import shutil
import statistics

import pytest

from tests.bench.weight_files import GIGABYTE, copy_seconds, run, write_two_shards

ROUNDS = 3
SIZE = float(os.environ.get("DIFFSYNTH_BENCH_GIGABYTES", "4"))
MOST_ANONYMOUS = 600 * 10**6
WIDTH, INNER = 3072, 12288


def checkpoint_shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """A transformer and a text encoder in full, half of the bytes each, and a LoRA on the transformer."""
    blocks = round(gigabytes * GIGABYTE / 2 / 2 / (2 * WIDTH * INNER))
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        for half in ("A", "B"):
            shape = (32, WIDTH) if half == "A" else (WIDTH, 32)
            shapes[f"pipe.dit.transformer_blocks.{block}.attn.to_q.lora_{half}.default.weight"] = shape
        shapes[f"pipe.dit.transformer_blocks.{block}.img_mlp.net.0.proj.weight"] = (INNER, WIDTH)
        shapes[f"pipe.text_encoder.model.language_model.layers.{block}.mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[f"pipe.dit.transformer_blocks.{block}.img_mlp.net.2.weight"] = (WIDTH, INNER)
        shapes[f"pipe.text_encoder.model.language_model.layers.{block}.mlp.down_proj.weight"] = (WIDTH, INNER)
    return shapes


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint in two shards; they go again at the end, for they are large."""
    folder = tmp_path / "checkpoint"

    def write(gigabytes: float) -> list:
        return write_two_shards(folder, "epoch-0", checkpoint_shapes(gigabytes), {"removed_prefix": ""})

    yield write
    shutil.rmtree(tmp_path)


def test_a_split_takes_less_than_1_3_times_a_copy(checkpoint, tmp_path):
    shards = checkpoint(SIZE)
    copies, synced, splits = [], [], []
    for _ in range(ROUNDS):
        copies.append(copy_seconds(shards, tmp_path / "copies", synced=False))
        synced.append(copy_seconds(shards, tmp_path / "copies", synced=True))
        splits.append(run(["split-ckpt", *shards, "--output_path", tmp_path / "parts"]))
        assert len(list((tmp_path / "parts").iterdir())) == 3
        shutil.rmtree(tmp_path / "parts")
    seconds = statistics.median(split.seconds for split in splits)
    fair, alone = seconds / statistics.median(synced), seconds / statistics.median(copies)
    memory = max(split.anonymous_bytes for split in splits)
    print(
        f"\nsplit-ckpt of {SIZE:g} GB: {seconds:.1f} s, {fair:.2f} x cp and sync, {alone:.2f} x cp alone; "
        f"anonymous memory {memory / 1e6:.0f} MB"
    )
    assert fair <= 1.3
    assert memory < MOST_ANONYMOUS


def test_a_split_of_twice_the_size_takes_no_more_memory(checkpoint, tmp_path):
    shards = checkpoint(2 * SIZE)
    split = run(["split-ckpt", *shards, "--output_path", tmp_path / "parts"])
    print(
        f"\nsplit-ckpt of {2 * SIZE:g} GB: {split.seconds:.1f} s, anonymous memory {split.anonymous_bytes / 1e6:.0f} MB"
    )
    assert split.anonymous_bytes < MOST_ANONYMOUS
