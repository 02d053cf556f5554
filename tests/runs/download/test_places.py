"""`diffsynth download`: what is already on disk, obstacles on disk, and file names that a hub may not choose."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import read_problems
from tests.hub_server import sha256
from tests.runs.download.conftest import DATASET, FILES, MODEL, REFUSED, files_below

VAE = "vae/diffusion_pytorch_model.safetensors"
ENTRY = f"{MODEL}:{VAE}"
AWAY = "move it elsewhere, or choose another folder"


def test_a_link_to_a_shorter_file_is_replaced_and_what_it_leads_to_stays(download, folder, tmp_path):
    """So is a file with a second hard link: resuming either would write into a file elsewhere."""
    (folder / "vae").mkdir(parents=True)
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(FILES[VAE][:1000])
    for link in (folder / VAE).symlink_to, (folder / VAE).hardlink_to:
        (folder / VAE).unlink(missing_ok=True)
        link(mine)
        assert "  damaged      30.0 kB" in download(ENTRY, "--dry_run").out
        assert download(ENTRY).code == 0
        assert mine.read_bytes() == FILES[VAE][:1000]
        assert not (folder / VAE).is_symlink() and (folder / VAE).read_bytes() == FILES[VAE]


@pytest.mark.parametrize("entry", [ENTRY, f"{MODEL}:transformer/*"])
def test_a_folder_where_a_file_belongs_is_told_before_anything_is_fetched(download, hub, folder, entry):
    (folder / VAE / "deep").mkdir(parents=True)
    (folder / "transformer").write_text("in the way")
    outcome = download(entry)
    in_the_way = {
        ENTRY: f"`{folder / VAE}` is a folder, but a file is to be written there",
        f"{MODEL}:transformer/*": f"`{folder / 'transformer'}` is a file, but a folder is to be created there",
    }
    assert (outcome.code, read_problems(outcome.err)) == (1, [(in_the_way[entry], AWAY)])
    assert hub.transfers == []


def test_a_base_that_is_a_file(download, hub, models):
    models.write_text("in the way")
    outcome = download(ENTRY)
    assert read_problems(outcome.err) == [(f"`{models}` is a file, but a folder is to be created there", AWAY)]
    assert hub.transfers == []


@pytest.mark.parametrize("path", ["../outside", "/outside", "deep/../../outside"])
def test_a_name_that_leaves_the_folder(download, hub, path, tmp_path):
    hub.repositories[f"datasets/{DATASET}"] = {path: b"x", "fine": b"x"}
    outcome = download("--dataset", DATASET)
    message = f"`{DATASET}` has a file '{path}', which points outside its folder"
    assert read_problems(outcome.err) == [(message, "choose other files, or report it to the owner")]
    assert hub.transfers == [] and not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize(
    "path",
    ["", "./a", "a//b", "a/", "a\nb", "a\x1b[2J", "a\0b", "\ud800", ".download.lock", "set/.a.png.0123456789ab.part"],
)
def test_a_name_that_no_file_gets(download, hub, path):
    """No control characters, nothing that a disk rejects, nothing that downloads reserve."""
    hub.repositories[f"datasets/{DATASET}"] = {path: b"x", "fine": b"x"}
    outcome = download("--dataset", DATASET)
    message = f"`{DATASET}` has a file {path!r}, which is not an allowed file name"
    assert read_problems(outcome.err) == [(message, "choose other files, or report it to the owner")]
    assert hub.transfers == []


def test_names_that_only_look_strange_are_kept(download, hub):
    content = {
        "a b/c d": b"1",
        "ü/é\u3000": b"2",
        "w#h?a%t/x&y=z+": b"3" * 3000,
        "..a/b..": b"4",
        "-c": b"5",
        "a\\..\\b": b"6",
    }
    hub.repositories[f"datasets/{DATASET}"] = content | {"empty": b""}
    assert download("--dataset", DATASET).code == 0
    assert files_below(Path("data/images")) == content | {"empty": b""}


@pytest.mark.parametrize("status", [401, 404])
def test_a_model_that_is_here_and_not_on_the_hub_is_not_called_whole(download, hub, source, folder, status):
    """Its files may be truncated: the hub provides nothing to compare them with, which is reported."""
    (folder / "vae").mkdir(parents=True)
    (folder / VAE).write_bytes(FILES[VAE][:100])
    hub.refusals[f"models/{MODEL}"] = status
    outcome = download(ENTRY)
    assert (outcome.code, hub.transfers) == (0, [])
    assert f"  unchecked      100 B  {VAE}\n1 file, 100 B: 1 unchecked\n" in outcome.err
    assert f"Not checked against the hub: {REFUSED[source][0]} " in outcome.err
    assert outcome.out == f"1 file is already present below `{folder.parent.parent}`\n"
    verified = json.loads(download(ENTRY, "--verify", "--dry_run", "--format", "json").out)
    assert [listed["state"] for listed in verified["files"]] == ["unchecked"]


@pytest.mark.parametrize("status", [401, 404])
def test_a_dataset_is_not_called_whole_for_some_file_in_its_folder(download, hub, tmp_path, status):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    hub.refusals[f"datasets/{DATASET}"] = status
    outcome = download("--dataset", DATASET, "--local_dir", tmp_path / "mine")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"`{DATASET}`" in read_problems(outcome.err)[0][0]


def test_the_glob_that_matches_nothing_is_the_one_told(download, hub, source):
    outcome = download("--dataset", DATASET, "--include", "set/*", "--include", "none*")
    title = REFUSED[source][0]
    message = f"{title} has no file that matches `{DATASET}:none*`; it has `other/`, `set/`"
    assert read_problems(outcome.err)[0][0] == message


def test_a_shard_that_the_hub_lacks(download, hub, source):
    name = "x-00001-of-00002.safetensors"
    hub.repositories[f"models/{MODEL}"] = {name: b"x"}
    title = REFUSED[source][0]
    message = f"{title} has no complete file that matches `{MODEL}:x*`; it has `{name}`"
    assert read_problems(download(f"{MODEL}:x*").err)[0][0] == message


def test_a_file_that_the_hub_has_changed_since(download, hub, folder):
    """With the same size: detected by its hash, which was cached during the download."""
    download(ENTRY)
    changed = bytes(len(FILES[VAE]))
    hub.repositories[f"models/{MODEL}"] = {VAE: changed}
    assert "  damaged  " in download(ENTRY).err
    assert sha256((folder / VAE).read_bytes()) == sha256(changed)
