"""A mirror is a copy of the run's folder that can be resumed from wherever copying breaks off."""

import errno
import ftplib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diffsynth_core.checkpoints.mirror import LIST, PARTIAL, Mirror, OfAnotherRun
from diffsynth_core.checkpoints.run_folder import CheckpointEntry, RunRecord


def write_run(folder: Path, *steps: int, keep_checkpoints: int | None = 2) -> None:
    """The files of a run with a checkpoint and a state after each of `steps`, and some that are not its own. Those of
    other steps are deleted; their previews stay.
    """
    record = RunRecord(
        {"keep_checkpoints": keep_checkpoints}, "flux", 0, "", {}, "no", 1, step=steps[-1],
        checkpoints=[CheckpointEntry(f"step-{step}.safetensors", step, 0, "", 0) for step in steps],
    )  # fmt: skip
    files = {"run.json": json.dumps(asdict(record)), "metrics.jsonl": "{}\n" * steps[-1], "train.log": "log"}
    for step in steps:
        files[f"step-{step}.safetensors"] = f"checkpoint {step}" * 99
        files |= {f"state/step-{step}/{name}.safetensors": f"{name} {step}" * 99 for name in ("trained", "optimizer")}
        files |= {f"state/step-{step}/state.json": f"state {step}"}
        files |= {f"samples/step-{step}/{name}": name * step for name in ("0001.png", "images.json")}
    shutil.rmtree(folder / "state", ignore_errors=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for name, text in (files | {".lock": "", "notes.txt": "mine", "state/.step-9.new/state.json": ""}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def own_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "notes.txt", LIST)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if ".new" not in str(path)}


class Breaking(MemoryFileSystem):
    """A file system on which only so many changes succeed; `on_write` is called before each file is written."""

    protocol = "breaking"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    left = 10**9
    moved: ClassVar[list[str]] = []
    on_write: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("breaking://"))

    @classmethod
    def clear(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]

    def change(self) -> None:
        type(self).left -= 1
        if self.left < 0:
            raise ConnectionError("the network is away")

    def _open(self, path, mode="rb", **kwargs):
        if "w" in mode:
            Breaking.on_write()
            self.change()
        return super()._open(path, mode, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self.change()
        self.moved.append(path2.rpartition("mirror/")[2])
        super().mv(path1, path2, **kwargs)

    def rm_file(self, path):
        if PARTIAL not in path:  # that is a part of moving it
            self.change()
        return super()._rm(path)


@pytest.fixture
def breaking() -> Iterator[type[Breaking]]:
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    Breaking.clear()
    Breaking.left, Breaking.moved, Breaking.on_write = 10**9, [], staticmethod(lambda: None)
    yield Breaking


def contents(address: str) -> dict[str, bytes]:
    """The files at a mirror, without the list."""
    system, root = fsspec.url_to_fs(address)
    found = {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}
    return {name: content for name, content in found.items() if name != LIST and PARTIAL not in name}


@pytest.mark.parametrize("where", ["folder", "file://{}/url", "breaking://mirror"])
def test_a_mirror_follows_its_run(tmp_path, monkeypatch, breaking, where):
    """Checkpoints and states that the run has deleted are deleted there too, and nothing else; what is unchanged is not
    copied again.
    """
    monkeypatch.chdir(tmp_path)
    run, address = tmp_path / "run", where.format(tmp_path)
    write_run(run, 2, 4)
    mirror = Mirror(address)
    mirror.check(None)
    first = mirror.update(run, "a")
    assert contents(address) == own_files(run)
    assert first == sum(map(len, own_files(run).values()))
    assert mirror.update(run, "a") == (run / "run.json").stat().st_size
    system, root = fsspec.url_to_fs(address)
    system.pipe_file(f"{root}/state/step-2/other.txt", b"not of the mirror")
    previews = {name: content for name, content in own_files(run).items() if name.startswith("samples")}
    write_run(run, 4, 6)
    shutil.rmtree(run / "samples")
    (run / "metrics.jsonl").write_text("more")
    again = Mirror(address)  # of the run that is resumed
    again.check("a")
    again.update(run, "a")
    assert contents(address) == own_files(run) | previews | {"state/step-2/other.txt": b"not of the mirror"}


def test_what_is_lost_here_stays_there(tmp_path):
    """Whatever has vanished though the run has not deleted it: even the folder."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    write_run(run, 2, 4)
    mirror = Mirror(str(copy))
    mirror.update(run, "a")
    there = own_files(copy)
    shutil.rmtree(run / "samples")
    for name in ("metrics.jsonl", "train.log", "step-2.safetensors", "step-4.safetensors"):
        (run / name).unlink()
    mirror.update(run, "a")
    assert own_files(copy) == there
    shutil.rmtree(run / "state/step-4")
    mirror.update(run, "a")
    assert own_files(copy) == there, "step 2 does not replace a later state"
    shutil.rmtree(run / "state")
    mirror.update(run, "a")
    assert own_files(copy) == there
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError):
        mirror.update(run, "a")
    assert own_files(copy) == there


def test_states_that_a_run_has_gone_back_behind_are_deleted(tmp_path):
    """It was resumed before them, so that they would continue another course."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    write_run(run, 2, 8)
    mirror = Mirror(str(copy))
    mirror.update(run, "a")
    write_run(run, 2, 4)
    mirror.update(run, "a")
    assert sorted(path.name for path in copy.glob("state/*")) == ["step-2", "step-4"]


def test_wherever_copying_breaks_off_what_is_there_is_whole(tmp_path, breaking):
    """A state with its `state.json` has its tensors, the state before is there until then, and the next update
    completes the copy.
    """
    run, address = tmp_path / "run", "breaking://mirror"
    for breaks_at in range(1000):
        breaking.clear()
        write_run(run, 2)
        mirror = Mirror(address)
        mirror.update(run, "a")
        before = own_files(run)
        write_run(run, 4)
        after, breaking.left = own_files(run), breaks_at
        try:
            mirror.update(run, "a")
        except ConnectionError:
            pass
        else:
            break
        there = contents(address)
        assert all(content in (before.get(name), after.get(name)) for name, content in there.items())
        whole = [
            step
            for step in (2, 4)
            if f"state/step-{step}/state.json" in there
            and all(f"state/step-{step}/{name}.safetensors" in there for name in ("trained", "optimizer"))
        ]
        assert whole and {"run.json"} <= there.keys(), breaks_at
        breaking.left = 10**9
        (mirror if breaks_at % 2 else Mirror(address)).update(run, "a")
        assert contents(address) == after
    assert breaks_at > 20


def test_what_makes_a_copy_complete_comes_last(tmp_path, breaking):
    write_run(tmp_path / "run", 2, 4)
    Mirror("breaking://mirror").update(tmp_path / "run", "a")
    states = [f"state/step-{step}/{name}" for step in (4, 2)
              for name in ("trained.safetensors", "optimizer.safetensors", "state.json")]  # fmt: skip
    assert breaking.moved[-8:] == [*states, "run.json", LIST]
    assert breaking.moved[0] == LIST


def test_what_the_run_deletes_while_it_is_copied_arrives_whole(tmp_path, breaking):
    """States, and checkpoints with `keep_checkpoints`."""
    run = tmp_path / "run"

    def delete() -> None:
        shutil.rmtree(run / "state")
        (run / "step-2.safetensors").unlink()

    write_run(run, 2)
    expected = own_files(run)
    calls = iter(range(10**6))
    breaking.on_write = lambda: delete() if next(calls) == 1 else None  # after the list
    Mirror("breaking://mirror").update(run, "a")
    assert {
        name: content
        for name, content in contents("breaking://mirror").items()
        if name.endswith((".safetensors", "state.json"))
    } == {name: content for name, content in expected.items() if name.endswith((".safetensors", "state.json"))}


def test_a_state_without_one_of_its_files_is_not_copied(tmp_path):
    """The run is about to delete it."""
    write_run(tmp_path / "run", 2, 4)
    (tmp_path / "run/state/step-2/trained.safetensors").unlink()
    Mirror(str(tmp_path / "mirror")).update(tmp_path / "run", "a")
    assert [path.name for path in (tmp_path / "mirror/state").iterdir()] == ["step-4"]


def test_many_checkpoints_are_not_open_at_once(tmp_path):
    """As after a run was copied back, which changes the times of all files."""
    run = tmp_path / "run"
    write_run(run, 2, keep_checkpoints=None)
    record = json.loads((run / "run.json").read_text())
    for number in range(99):
        record["checkpoints"].append({**record["checkpoints"][0], "file": f"epoch-{number}.safetensors"})
        (run / f"epoch-{number}.safetensors").write_text(str(number))
    (run / "run.json").write_text(json.dumps(record))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 50, limits[1]))
    try:
        Mirror(str(tmp_path / "copy")).update(run, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert own_files(tmp_path / "copy") == own_files(run)


class Closing(Breaking):
    """A file system whose connection stays closed after a failure, as that of sftp does."""

    protocol = "closing"
    cachable = True
    closed = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("closing://"))

    def change(self) -> None:
        if self.closed:
            raise OSError("the socket is closed")
        try:
            super().change()
        except ConnectionError:
            self.closed = True
            raise


def test_a_connection_that_was_closed_is_opened_again(tmp_path, breaking):
    fsspec.register_implementation("closing", Closing, clobber=True)
    write_run(tmp_path / "run", 2)
    mirror, Closing.left = Mirror("closing://mirror"), 3
    with pytest.raises(ConnectionError):
        mirror.update(tmp_path / "run", "a")
    Closing.left = 10**9
    mirror.update(tmp_path / "run", "a")
    assert contents("closing://mirror") == own_files(tmp_path / "run")


@pytest.fixture
def refuse_taken(monkeypatch, breaking) -> Callable[[Exception], None]:
    """Let a file system raise an error when a file is moved to a name that is taken."""
    move = breaking.mv

    def refuse(error: Exception) -> None:
        def move_if_free(system, source, target, **kwargs):
            if system.exists(target):
                raise error
            move(system, source, target, **kwargs)

        monkeypatch.setattr(breaking, "mv", move_if_free)

    return refuse


@pytest.mark.parametrize("error", [OSError(errno.EEXIST, "taken"), ftplib.error_perm("550")], ids=["smb", "ftp"])
def test_a_file_system_that_renames_to_no_name_that_is_taken(tmp_path, refuse_taken, error):
    refuse_taken(error)
    mirror = Mirror("breaking://mirror")
    mirror.check(None)
    for steps in ((2,), (2, 4)):
        write_run(tmp_path / "run", *steps)
        mirror.update(tmp_path / "run", "a")
    assert contents("breaking://mirror") == own_files(tmp_path / "run")


def test_a_file_system_that_replaces_no_file_is_found_before_the_run(refuse_taken):
    refuse_taken(PermissionError(errno.EPERM, "not allowed"))
    with pytest.raises(PermissionError):
        Mirror("breaking://mirror").check(None)


def test_the_copy_of_another_run_is_left_alone(tmp_path):
    write_run(tmp_path / "run", 2)
    Mirror(str(tmp_path / "mirror")).update(tmp_path / "run", "a")
    there = own_files(tmp_path / "mirror")
    for check in (Mirror.check, lambda mirror, run: mirror.update(tmp_path / "run", run or "b")):
        for run in ("b", None):
            with pytest.raises(OfAnotherRun, match="holds another run"):
                check(Mirror(str(tmp_path / "mirror")), run)
    assert own_files(tmp_path / "mirror") == there


@pytest.mark.parametrize(("name", "said"), [("cat.png", "`cat.png`"), (LIST, "damaged")])
def test_a_folder_with_other_files_is_no_mirror(tmp_path, name, said):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / name).write_text("{")
    with pytest.raises(OfAnotherRun, match=said):
        Mirror(str(tmp_path / "mirror")).check(None)
    assert [path.name for path in (tmp_path / "mirror").iterdir()] == [name]


def test_a_check_does_not_disturb_the_run_that_is_copied_meanwhile(tmp_path, monkeypatch, breaking):
    """Planning checks the mirror before it notices that the run goes on."""
    run, address = tmp_path / "run", "breaking://mirror"
    write_run(run, 2)
    Mirror(address).update(run, "a")
    write_run(run, 2, 4)
    move, once = breaking.mv, iter([Mirror(address)])

    def check_and_move(system, *paths, **kwargs):
        for mirror in once:
            mirror.check("a")
        move(system, *paths, **kwargs)

    monkeypatch.setattr(breaking, "mv", check_and_move)
    Mirror(address).update(run, "a")
    assert contents(address) == own_files(run)


def test_a_check_leaves_nothing_behind(tmp_path):
    Mirror(str(tmp_path / "a/b/mirror")).check(None)
    assert list(tmp_path.iterdir()) == []
