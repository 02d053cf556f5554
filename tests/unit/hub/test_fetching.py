"""Downloads from a fake hub, for faults that the loopback server cannot produce."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffsynth_core.errors import DiffSynthError, FaultsFound
from diffsynth_core.hub import fetching
from diffsynth_core.hub.client import (
    Checksum,
    RemoteFile,
    Repository,
    TransientHubError,
    download_source,
    downloads_disabled,
    not_found,
)
from diffsynth_core.hub.download_plan import DownloadPlan, plan_download
from diffsynth_core.hub.fetching import fetch
from diffsynth_core.hub.file_requests import FileRequest, RepoFiles
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.hub.ranges import first_byte, range_headers
from diffsynth_core.progress import SilentReporter

MODEL, OTHER = Repository("model", "a/b"), Repository("model", "a/other")
CONTENT = b"0123456789"
SHA256 = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())
Answer = Callable[[int], tuple[int, Iterator[bytes]]]


def from_start(start: int) -> tuple[int, Iterator[bytes]]:
    return start, iter([CONTENT[start:]])


class PlayedHub:
    """Lists files, and answers transfers with the given functions in order, the last one repeatedly."""

    title, login, another = "Played", "played login", "play another"

    def __init__(self, files: dict[str, Checksum | None], *answers: Answer) -> None:
        self._files, self._answers, self.starts = files, list(answers) or [from_start], []

    def page(self, repository: Repository) -> str:
        return f"played/{repository.name}"

    def files(self, repository: Repository) -> list[RemoteFile]:
        if repository == OTHER:
            raise not_found(self, repository)
        return [RemoteFile(path, len(CONTENT), checksum) for path, checksum in self._files.items()]

    @contextmanager
    def read(self, repository: Repository, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        self.starts.append(start)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        yield answer(start)


class Listener(SilentReporter):
    """Records warnings and the progress of tasks."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.done: dict[str, int] = {}

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @contextmanager
    def task(self, label, total, unit, done=0):
        self.done[label] = done
        yield _Counter(self.done, label)


class _Counter:
    def __init__(self, done: dict[str, int], label: str) -> None:
        self._done, self._label = done, label

    def advance(self, amount: int = 1, **fields: str) -> None:
        self._done[self._label] += amount


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BACK_OFF_SECONDS", (0,) * 5)
    monkeypatch.setattr(fetching, "SHOWN_BYTES", len(CONTENT))


@pytest.fixture
def identities(tmp_path: Path) -> HashCache:
    return HashCache(tmp_path / "identities.jsonl")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "models"


def plan(hub: PlayedHub, base: Path, identities: HashCache, *places: RepoFiles) -> DownloadPlan:
    return plan_download([FileRequest(places or (RepoFiles(MODEL, ("*",)),))], hub, base, identities)


def test_a_hub_without_ranges_sends_all_again_and_progress_goes_back(base, identities):
    def broken(start: int) -> tuple[int, Iterator[bytes]]:
        return 0, iter([CONTENT[:4]])

    hub, listener = PlayedHub({"x": SHA256}, broken, lambda start: (0, iter([CONTENT]))), Listener()
    fetch(plan(hub, base, identities), hub, identities, listener)
    assert (base / "a/b/x").read_bytes() == CONTENT
    assert hub.starts == [0, 4]
    assert listener.warnings == ["`x`: the hub ended the transfer early; retrying in 0 s (1 of 5)"]
    assert listener.done == {"1 file in total": 10, "x": 10}


def test_small_files_have_no_progress_of_their_own(base, identities, monkeypatch):
    monkeypatch.setattr(fetching, "SHOWN_BYTES", len(CONTENT) + 1)
    hub, listener = PlayedHub({"x": SHA256, "y": SHA256}), Listener()
    fetch(plan(hub, base, identities), hub, identities, listener)
    assert listener.done == {"2 files in total": 20}


def test_more_bytes_than_listed_are_not_kept(base, identities):
    hub = PlayedHub({"x": SHA256}, lambda start: (start, iter([CONTENT[start:] + b"more"])))
    with pytest.raises(FaultsFound) as failed:
        fetch(plan(hub, base, identities), hub, identities, SilentReporter())
    assert failed.value.problems[0].message == (
        "cannot download `x` of `a/b` from Played: the hub sent more bytes than its file list declares"
    )
    assert len(hub.starts) == 6 and list((base / "a/b").iterdir()) == []


def test_another_part_than_was_asked_for(base, identities):
    hub = PlayedHub({"x": SHA256}, lambda start: (7, iter([CONTENT[7:]])), from_start)
    fetch(plan(hub, base, identities), hub, identities, SilentReporter())
    assert (base / "a/b/x").read_bytes() == CONTENT


def test_attempts_that_bring_something_are_not_counted_together(base, identities):
    """Ten bytes, one per connection: more interruptions than attempts without progress are allowed."""
    hub = PlayedHub({"x": SHA256}, lambda start: (start, iter([CONTENT[start : start + 1]])))
    fetch(plan(hub, base, identities), hub, identities, SilentReporter())
    assert hub.starts == list(range(10))


@pytest.mark.parametrize("checksum", [None, SHA256, Checksum("git", "ad471007bd7f5983d273b9584e5629230150fd54")])
def test_wrong_bytes_once_are_fetched_again(base, identities, checksum):
    """The git id is that of `git hash-object`; without any checksum the size decides."""
    hub, listener = PlayedHub({"x": checksum}, lambda start: (start, iter([b"x" * 10])), from_start), Listener()
    fetch(plan(hub, base, identities), hub, identities, listener)
    assert (base / "a/b/x").read_bytes() == (CONTENT if checksum else b"x" * 10)
    assert len(listener.warnings) == (1 if checksum else 0)


def test_of_two_beginnings_the_longer_is_gone_on_from(base, identities):
    """A partial file of an earlier download, and a truncated file of another program."""
    hub = PlayedHub({"x": SHA256})
    (listed,) = plan(hub, base, identities).files
    listed.target.parent.mkdir(parents=True)
    listed.part.write_bytes(CONTENT[:6])
    listed.target.write_bytes(CONTENT[:3])
    made = plan(hub, base, identities)
    assert [(one.state, one.bytes_here) for one in made.files] == [("incomplete", 6)]
    fetch(made, hub, identities, SilentReporter())
    assert hub.starts == [6] and listed.target.read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_counts_as_nothing(base, identities):
    hub = PlayedHub({"x": SHA256})
    (listed,) = plan(hub, base, identities).files
    listed.target.parent.mkdir(parents=True)
    listed.part.write_bytes(CONTENT + b"more")
    made = plan(hub, base, identities)
    assert [(one.state, one.bytes_here) for one in made.files] == [("missing", 0)]
    fetch(made, hub, identities, SilentReporter())
    assert hub.starts == [0] and listed.target.read_bytes() == CONTENT


def test_the_disk_refuses(base, identities, monkeypatch):
    def refuse(part: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub = PlayedHub({"x": SHA256, "y": SHA256})
    monkeypatch.setattr(fetching._Part, "append", refuse)
    with pytest.raises(DiffSynthError, match=r"cannot write `.*`: No space left on device"):
        fetch(plan(hub, base, identities), hub, identities, SilentReporter())


def test_a_fault_of_ours_is_not_hidden_in_a_thread(base, identities):
    def fault(start: int) -> tuple[int, Iterator[bytes]]:
        raise ZeroDivisionError

    hub = PlayedHub({"x": SHA256}, fault)
    with pytest.raises(ZeroDivisionError):
        fetch(plan(hub, base, identities), hub, identities, SilentReporter())


def test_a_part_of_what_the_hub_had_before_is_not_continued(base, identities):
    (base / "a/b").mkdir(parents=True)
    (base / "a/b/.x.000000000000.part").write_bytes(b"old")
    hub = PlayedHub({"x": SHA256})
    listed = plan(hub, base, identities)
    assert (listed.files[0].state, listed.missing_bytes) == ("missing", 10)
    fetch(listed, hub, identities, SilentReporter())
    assert [path.name for path in (base / "a/b").iterdir()] == ["x"]
    assert hub.starts == [0]


def test_a_folder_is_read_once_however_many_files_come(base, identities, monkeypatch):
    """Listing it for each file would take hours with a hundred thousand files."""
    reads: list[Path] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reads.append(Path(path)) or scan(path))
    names = [f"{number}" for number in range(20)]
    (base / "a/b").mkdir(parents=True)
    hub = PlayedHub(dict.fromkeys(names, SHA256))
    listed = plan(hub, base, identities)
    reads.clear()
    fetch(listed, hub, identities, SilentReporter())
    assert len(list((base / "a/b").iterdir())) == 20
    assert reads.count(base / "a/b") <= 1


def test_a_file_known_to_have_other_bytes_is_damaged(base, identities):
    """Its size is right; its wrong hash is known from a run that read it."""
    target = base / "a/b/x"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"x" * 10)
    hub = PlayedHub({"x": SHA256})
    assert plan(hub, base, identities).files[0].state == "here"
    identities.sha256(target)
    listed = plan(hub, base, identities)
    assert listed.files[0].state == "damaged"
    fetch(listed, hub, identities, SilentReporter())
    assert target.read_bytes() == CONTENT


def test_the_next_place_is_asked_where_the_first_has_nothing(base, identities):
    hub = PlayedHub({"x": None, "y": None})
    listed = plan(hub, base, identities, RepoFiles(OTHER, ("x",)), RepoFiles(MODEL, ("z",)), RepoFiles(MODEL, ("y",)))
    assert [file.target for file in listed.files] == [base / "a/b/y"]
    with pytest.raises(FaultsFound) as failed:
        plan(hub, base, identities, RepoFiles(OTHER, ("x",)), RepoFiles(MODEL, ("z",)))
    assert [problem.message for problem in failed.value.problems] == [
        "Played has no model `a/other` that you have access to"
    ]


def test_what_is_here_and_not_on_the_hub_stays(base, identities):
    (base / "a/other").mkdir(parents=True)
    (base / "a/other/x").write_bytes(b"mine")
    listed = plan(PlayedHub({"x": None}), base, identities, RepoFiles(OTHER, ("x",)), RepoFiles(MODEL, ("x",)))
    assert [(file.target, file.state) for file in listed.files] == [(base / "a/other/x", "unchecked")]
    assert listed.refusals == ("Played has no model `a/other` that you have access to",)


def test_a_hub_that_cannot_be_reached(base, identities):
    class Unreachable(PlayedHub):
        def files(self, repository: Repository) -> list[RemoteFile]:
            raise TransientHubError("the connection was lost (ConnectError)")

    with pytest.raises(DiffSynthError, match=r"cannot get the file list of `a/b` from Played: the connection was lost"):
        plan(Unreachable({}), base, identities)


def test_ranges():
    assert range_headers(0) == {"Accept-Encoding": "identity"}
    assert range_headers(5) == {"Accept-Encoding": "identity", "Range": "bytes=5-"}
    assert first_byte(200, {}, 10) == first_byte(200, {"Content-Length": "10"}, 10) == 0
    assert first_byte(200, {"Content-Length": "7", "Content-Encoding": "gzip"}, 10) == 0
    for total in ("10", "*"):
        assert first_byte(206, {"Content-Range": f"bytes 5-9/{total}", "Content-Length": "5"}, 10) == 5
    with pytest.raises(TransientHubError, match="without declaring which"):
        first_byte(206, {}, 10)


@pytest.mark.parametrize(
    ("status", "headers"), [(200, {"Content-Length": "18"}), (206, {"Content-Range": "bytes 5-17/18"})]
)
def test_an_answer_of_another_size_is_no_beginning(status, headers):
    with pytest.raises(TransientHubError, match="a file of 18 bytes, but its file list declares 10"):
        first_byte(status, headers, 10)


def test_where_is_downloaded_from(monkeypatch):
    monkeypatch.delenv("DIFFSYNTH_DOWNLOAD_SOURCE", raising=False)
    assert download_source(None) == "modelscope"
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "HuggingFace")
    assert download_source(None) == "huggingface"
    assert download_source("modelscope") == "modelscope"


@pytest.mark.parametrize(("value", "off"), [("", False), ("0", False), ("False", False), ("1", True), ("true", True)])
def test_the_switch_in_the_environment(monkeypatch, value, off):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    assert downloads_disabled() is off
