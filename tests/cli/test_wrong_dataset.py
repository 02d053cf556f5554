"""Faulty datasets: `diffsynth train` names file, row and column before doing anything."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.naming import names

ROW_OUT = names("replace the file")
NO_SUCH_FILE = names("correct the path")


def test_no_folder(refuse):
    message = names("nowhere", "dataset_base_path", "does not exist")
    assert refuse("--dataset_base_path", "nowhere") == (1, [(message, names("--dataset_base_path"))])


def test_no_metadata_file(refuse):
    message = names("nowhere.csv", "dataset_metadata_path", "does not exist")
    assert refuse("--dataset_metadata_path", "nowhere.csv") == (1, [(message, names("--dataset_metadata_path"))])


def test_an_empty_folder(refuse, dataset):
    shutil.rmtree(dataset)
    dataset.mkdir()
    assert refuse() == (
        1,
        [
            (
                names(dataset, "neither", "metadata.csv", "metadata.json", "metadata.jsonl"),
                names("metadata.csv", "image", "prompt"),
            )
        ],
    )


def test_images_without_captions(refuse, dataset):
    (dataset / "metadata.csv").unlink()
    (dataset / "astronaut.txt").write_text("an astronaut")
    code, [(message, told), *others] = refuse()
    assert code == 1
    assert message == names(dataset, "chelsea.png", "no caption", "chelsea.txt")
    assert told == names("write the caption") and len(others) == 2


def test_rows_that_name_missing_files(refuse, dataset):
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\ncoffee.png,b\nnor/this.png,c\n")
    where = f"{dataset}/metadata.csv"
    assert refuse() == (
        1,
        [
            (names(where, "row 1", "image", "no.png", "does not exist"), NO_SUCH_FILE),
            (names(where, "row 3", "image", "nor/this.png", "does not exist"), NO_SUCH_FILE),
        ],
    )


@pytest.mark.parametrize("name", ["a\0b.png", "nor\0/b.png", "n" * 300 + ".png"])
def test_names_that_no_file_can_have(refuse, dataset, name):
    (dataset / "metadata.json").write_text(json.dumps([{"image": name, "prompt": "a"}]))
    (dataset / "metadata.csv").unlink()
    code, [(message, hint)] = refuse(hide=(r"n{9,}",))
    assert (code, hint) == (1, NO_SUCH_FILE)
    assert message == names("row 1", "image", "does not exist")


@pytest.mark.parametrize(
    ("header", "column", "there", "hint"),
    [
        ("imge,prompt", "image", names("imge", "prompt"), names("rename", "imge")),
        ("image,promt", "prompt", names("image", "promt"), names("rename", "promt")),
        ("image,zzz", "prompt", names("image", "zzz"), "add the column"),
    ],
)
def test_a_missing_column(refuse, dataset, header, column, there, hint):
    (dataset / "metadata.csv").write_text(f"{header}\ncoffee.png,a\n")
    message = names(f"{dataset}/metadata.csv", "no column", column, there)
    assert refuse() == (1, [(message, hint)])


@pytest.mark.parametrize(
    ("name", "text", "fault", "hint"),
    [
        ("metadata.csv", "", names("no rows"), names("add one row")),
        ("metadata.csv", "image,prompt\n", names("no rows"), names("add one row")),
        (
            "metadata.csv",
            "image,prompt\ncoffee.png,a cup, red\n",
            names("line 2", "3 cells", "header", 2),
            names("quote values that"),
        ),
        (
            "metadata.csv",
            "image,prompt\ncoffee.png,a\n,b\n",
            names("row 2", "image", "is empty"),
            names("add the file"),
        ),
        (
            "metadata.json",
            '[{"image": "coffee.png", "prompt": 3}]',
            names("row 1", "prompt", 3, "a string"),
            names("a string"),
        ),
        (
            "metadata.json",
            '[{"image": ["coffee.png", "rocket.png"], "prompt": "a"}]',
            names("row 1", "image", "2 files"),
            names("write one row"),
        ),
        (
            "metadata.jsonl",
            '{"image": "coffee.png", "prompt": "a"}\n\n[1]\n',
            names("row 2", "a list", "an object"),
            names("write one object"),
        ),
        (
            "metadata.jsonl",
            '{"image": "coffee.png", "prompt": "a"}\n{\n',
            names("line 2", "Expecting"),
            "fix that line",
        ),
    ],
)
def test_metadata_that_cannot_be_used(refuse, dataset, name, text, fault, hint):
    (dataset / "metadata.csv").unlink()
    (dataset / name).write_text(text)
    assert refuse() == (1, [(names(dataset / name, fault), hint)])


def test_metadata_in_another_encoding(refuse, dataset):
    (dataset / "metadata.csv").write_bytes("image,prompt\ncoffee.png,café\n".encode("latin-1"))
    message = names(f"{dataset}/metadata.csv", "line 2", "not UTF-8", "byte 27", "Windows-1252", "Latin-1")
    assert refuse() == (1, [(message, "save it as UTF-8")])


@pytest.mark.parametrize(
    ("content", "reason"), [(b"I am a text", "cannot identify"), (b"", names("is empty"))], ids=["text", "empty"]
)
def test_an_image_that_is_none(refuse, dataset, content, reason):
    (dataset / "coffee.png").write_bytes(content)
    message = names(f"{dataset}/metadata.csv", "row 3", f"{dataset}/coffee.png", "cannot be read", reason)
    assert refuse() == (1, [(message, ROW_OUT)])


def test_an_image_cut_short(refuse, dataset):
    path = dataset / "coffee.png"
    path.write_bytes(path.read_bytes()[:-2000])
    code, [(message, hint)] = refuse()
    assert (code, hint) == (1, ROW_OUT)
    assert message == names(f"{dataset}/metadata.csv", "row 3", path, "cannot be read")


@pytest.mark.parametrize("size", [(15, 64), (64, 15)])
@pytest.mark.parametrize("fixed", [(), ("--height", 64, "--width", 64)])
def test_an_image_with_a_side_under_16_pixels(refuse, dataset, size, fixed):
    """No `max_pixels` makes a side longer, so the message must not suggest it."""
    Image.new("RGB", size).save(dataset / "coffee.png")
    code, [(message, hint)] = refuse(*fixed)
    where = names(f"{dataset}/metadata.csv", "row 3", f"{dataset}/coffee.png", f"{size[0]} x {size[1]} pixels")
    assert code == 1
    assert message == names(where, "minimum of 16")
    assert "max_pixels" not in message + hint


def test_an_image_that_max_pixels_makes_too_small(refuse, dataset):
    Image.new("RGB", (32, 256)).save(dataset / "coffee.png")
    assert refuse("--max_pixels", 1024) == (
        1,
        [
            (
                names(
                    f"{dataset}/metadata.csv",
                    "row 3",
                    f"{dataset}/coffee.png",
                    "32 x 256 pixels",
                    "max_pixels",
                    1024,
                    "minimum of 16",
                ),
                names("raise `max_pixels`"),
            )
        ],
    )


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["--data_file_keys", "video"],
            names("data_file_keys", "not include", "image"),
            names("--data_file_keys video,image"),
        ),
        (
            ["--extra_inputs", "template_inputs"],
            names("extra_inputs", "template_inputs", "Qwen-Image"),
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
    assert outcome.err == names("error:", path, "cannot be read")
    assert outcome.err == names("hint: replace")
    assert "Traceback" not in outcome.err and not Path("out").exists()
