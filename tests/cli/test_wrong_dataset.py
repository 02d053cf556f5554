"""Faulty datasets: `diffsynth train` names file, row and column before doing anything."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROW_OUT = "replace the file or remove its row"
NO_SUCH_FILE = "correct the path (relative to `dataset_base_path`), or remove the row"


def test_no_folder(refuse):
    message = "the dataset folder `nowhere` (`dataset_base_path`) does not exist"
    assert refuse("--dataset_base_path", "nowhere") == (1, [(message, "pass the folder with `--dataset_base_path`")])


def test_no_metadata_file(refuse):
    message = "the metadata file `nowhere.csv` (`dataset_metadata_path`) does not exist"
    assert refuse("--dataset_metadata_path", "nowhere.csv") == (1, [(message, "fix `--dataset_metadata_path`")])


def test_an_empty_folder(refuse, dataset):
    shutil.rmtree(dataset)
    dataset.mkdir()
    assert refuse() == (
        1,
        [
            (
                f"`{dataset}` contains neither metadata.csv, metadata.json, metadata.jsonl nor images",
                "write a metadata.csv with the columns `image` and `prompt`",
            )
        ],
    )


def test_images_without_captions(refuse, dataset):
    (dataset / "metadata.csv").unlink()
    (dataset / "astronaut.txt").write_text("an astronaut")
    code, [(message, hint)] = refuse()
    assert code == 1
    assert message.endswith(f"no caption file for 3 of its 4 images; the first is `{dataset}/chelsea.png`")
    assert hint.startswith(f"write the caption to `{dataset}/chelsea.txt`")


def test_rows_that_name_missing_files(refuse, dataset):
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\ncoffee.png,b\nnor/this.png,c\n")
    where = f"`{dataset}/metadata.csv` row"
    assert refuse() == (
        1,
        [
            (f"{where} 1: column `image` names `{dataset}/no.png`, which does not exist", NO_SUCH_FILE),
            (f"{where} 3: column `image` names `{dataset}/nor/this.png`, which does not exist", NO_SUCH_FILE),
        ],
    )


@pytest.mark.parametrize("name", ["a\0b.png", "nor\0/b.png", "n" * 300 + ".png"])
def test_names_that_no_file_can_have(refuse, dataset, name):
    (dataset / "metadata.json").write_text(json.dumps([{"image": name, "prompt": "a"}]))
    (dataset / "metadata.csv").unlink()
    code, [(message, hint)] = refuse()
    assert (code, hint) == (1, NO_SUCH_FILE)
    assert message.endswith("which does not exist")


@pytest.mark.parametrize(
    ("header", "column", "there", "hint"),
    [
        ("imge,prompt", "image", "`imge`, `prompt`", "rename `imge`"),
        ("image,promt", "prompt", "`image`, `promt`", "rename `promt`"),
        ("image,zzz", "prompt", "`image`, `zzz`", "add the column"),
    ],
)
def test_a_missing_column(refuse, dataset, header, column, there, hint):
    (dataset / "metadata.csv").write_text(f"{header}\ncoffee.png,a\n")
    message = f"`{dataset}/metadata.csv` has no column `{column}`; it has {there}"
    assert refuse() == (1, [(message, hint)])


@pytest.mark.parametrize(
    ("name", "text", "fault", "hint"),
    [
        ("metadata.csv", "", " has no rows", "add one row per sample"),
        ("metadata.csv", "image,prompt\n", " has no rows", "add one row per sample"),
        (
            "metadata.csv",
            "image,prompt\ncoffee.png,a cup, red\n",
            " row 1: 3 cells, but the header has 2",
            "quote values that contain commas",
        ),
        (
            "metadata.csv",
            "image,prompt\ncoffee.png,a\n,b\n",
            " row 2: column `image` is empty",
            "add the file, or remove the row",
        ),
        (
            "metadata.json",
            '[{"image": "coffee.png", "prompt": 3}]',
            " row 1: column `prompt` holds `3`, expected a string",
            "write the caption as a string",
        ),
        (
            "metadata.json",
            '[{"image": ["coffee.png", "rocket.png"], "prompt": "a"}]',
            " row 1: column `image` lists 2 files, expected one",
            "write one row per file",
        ),
        (
            "metadata.jsonl",
            '{"image": "coffee.png", "prompt": "a"}\n\n[1]\n',
            " row 2 is a list, expected an object",
            "write one object per sample",
        ),
        (
            "metadata.jsonl",
            '{"image": "coffee.png", "prompt": "a"}\n{\n',
            " line 2: Expecting property name enclosed in double quotes",
            "fix that line",
        ),
    ],
)
def test_metadata_that_cannot_be_used(refuse, dataset, name, text, fault, hint):
    (dataset / "metadata.csv").unlink()
    (dataset / name).write_text(text)
    assert refuse() == (1, [(f"`{dataset / name}`{fault}", hint)])


def test_metadata_in_another_encoding(refuse, dataset):
    (dataset / "metadata.csv").write_bytes("image,prompt\ncoffee.png,café\n".encode("latin-1"))
    message = f"`{dataset}/metadata.csv` is not UTF-8 (byte 27): it looks like Windows-1252 or Latin-1"
    assert refuse() == (1, [(message, "save it as UTF-8")])


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"I am a text", "cannot identify image file"), (b"", "the file is empty")],
    ids=["text", "empty"],
)
def test_an_image_that_is_none(refuse, dataset, content, reason):
    (dataset / "coffee.png").write_bytes(content)
    message = f"`{dataset}/metadata.csv` row 3: `{dataset}/coffee.png` cannot be read as an image: {reason}"
    assert refuse() == (1, [(message, ROW_OUT)])


def test_an_image_cut_short(refuse, dataset):
    path = dataset / "coffee.png"
    path.write_bytes(path.read_bytes()[:-2000])
    code, [(message, hint)] = refuse()
    assert (code, hint) == (1, ROW_OUT)
    assert message.startswith(f"`{dataset}/metadata.csv` row 3: `{path}` cannot be read as an image: ")


@pytest.mark.parametrize("size", [(15, 64), (64, 15)])
@pytest.mark.parametrize("fixed", [(), ("--height", 64, "--width", 64)])
def test_an_image_with_a_side_under_16_pixels(refuse, dataset, size, fixed):
    """No `max_pixels` makes a side longer, so the message must not suggest it."""
    Image.new("RGB", size).save(dataset / "coffee.png")
    code, [(message, hint)] = refuse(*fixed)
    where = f"`{dataset}/metadata.csv` row 3: `{dataset}/coffee.png` is {size[0]} x {size[1]} pixels"
    assert code == 1
    assert message.startswith(where) and "the minimum of 16" in message
    assert "max_pixels" not in message + hint


def test_an_image_that_max_pixels_makes_too_small(refuse, dataset):
    Image.new("RGB", (32, 256)).save(dataset / "coffee.png")
    assert refuse("--max_pixels", 1024) == (
        1,
        [
            (
                f"`{dataset}/metadata.csv` row 3: `{dataset}/coffee.png` is 32 x 256 pixels; "
                "with `max_pixels` 1024 a side falls below the minimum of 16",
                "replace the image, remove its row, or raise `max_pixels`",
            )
        ],
    )


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["--data_file_keys", "video"],
            "`data_file_keys` does not include `image`, whose files this run reads",
            "pass `--data_file_keys video,image`",
        ),
        (
            ["--extra_inputs", "template_inputs"],
            "`extra_inputs` names `template_inputs`, which Qwen-Image does not support",
            "it takes edit_image, controlnet_image",
        ),
    ],
)
def test_columns_that_do_not_fit_the_family(refuse, arguments, message, hint):
    assert refuse(*arguments) == (2, [(message, hint)])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_only_decoding_finds_damaged(cli, dataset, tmp_path, workers):
    """Header and end are intact, the middle is not: reported by name while encoding, with and without workers."""
    path = dataset / "chelsea.png"
    content = bytearray(path.read_bytes())
    content[600:900] = bytes(300)
    path.write_bytes(content)
    outcome = cli(
        "train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dataset_num_workers", workers,
        "--cache_path", tmp_path / "own_cache", "--output_path", "out",
    )  # fmt: skip
    assert outcome.code == 1
    assert f"error: `{path}` cannot be read as an image" in outcome.err
    assert "hint: replace the file or remove its row" in outcome.err
    assert "Traceback" not in outcome.err and not Path("out").exists()
