"""Cached hashes: correct after every kind of change, shared between processes, and robust against a truncated line."""

import hashlib
import json
import os
import threading
from contextlib import contextmanager

import pytest

from diffsynth_core.hub.identity import HashCache
from diffsynth_core.progress import SilentReporter, SilentTask


@pytest.fixture
def memory(tmp_path):
    return tmp_path / "cache" / "identities.jsonl"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    return path


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def spoil(memory) -> None:
    """Put a wrong hash into every cached line, so that cache hits are visible."""
    lines = [{**json.loads(line), "answer": "remembered"} for line in memory.read_text().splitlines()]
    memory.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_hash_is_right_and_remembered_by_the_next_instance(memory, file):
    assert HashCache(memory).known(file) is None
    assert HashCache(memory).sha256(file) == sha(b"one")
    assert HashCache(memory).known(file) == sha(b"one")
    spoil(memory)
    assert HashCache(memory).sha256(file) == "remembered"


def test_a_path_is_remembered_however_it_is_written(memory, file, monkeypatch):
    HashCache(memory).sha256(file)
    monkeypatch.chdir(file.parent)
    from pathlib import Path

    assert HashCache(memory).known(Path("weights.safetensors")) == sha(b"one")
    assert HashCache(memory).known(file.parent / "cache" / ".." / "weights.safetensors") == sha(b"one")


def test_a_changed_file_is_read_again(memory, file):
    identities = HashCache(memory)
    identities.sha256(file)
    file.write_bytes(b"longer than before")
    assert identities.known(file) is None
    assert identities.sha256(file) == HashCache(memory).known(file) == sha(b"longer than before")


def test_a_change_of_the_same_size_under_the_old_time_is_seen(memory, file):
    identities = HashCache(memory)
    identities.sha256(file)
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert identities.known(file) is None
    assert identities.sha256(file) == sha(b"two")


def test_a_file_put_in_its_place_is_seen(memory, file, tmp_path):
    identities = HashCache(memory)
    identities.sha256(file)
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert identities.sha256(file) == sha(b"two")


def test_the_last_of_several_lines_counts(memory, file):
    for content in (b"one", b"two", b"six"):
        file.write_bytes(content)
        HashCache(memory).sha256(file)
    assert len(memory.read_text().splitlines()) == 3
    assert HashCache(memory).known(file) == sha(b"six")


@pytest.mark.parametrize("rest", ['{"path": "/x", "sta', "{", "\0\0\0\0", '{"path": "/x"}', "[1]", "7", "null"])
def test_a_torn_line_is_passed_over(memory, file, rest):
    HashCache(memory).sha256(file)
    with memory.open("a") as stream:
        stream.write(rest)
    assert HashCache(memory).known(file) == sha(b"one")


def test_what_is_remembered_behind_a_torn_line_is_not_lost(memory, file, tmp_path):
    HashCache(memory).sha256(file)
    whole = memory.read_text()
    memory.write_text(whole + whole[: len(whole) // 2])
    other = tmp_path / "other"
    other.write_bytes(b"two")
    HashCache(memory).sha256(other)
    assert HashCache(memory).known(other) == sha(b"two")
    assert HashCache(memory).known(file) == sha(b"one")


def test_instances_may_append_at_the_same_time(memory, tmp_path):
    paths = [tmp_path / f"file {number}" for number in range(60)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number)
    instances = [HashCache(memory) for _ in range(3)]
    threads = [
        threading.Thread(target=lambda each=each, part=part: [each.sha256(path) for path in paths[part::3]])
        for part, each in enumerate(instances)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = HashCache(memory)
    assert [everything.known(path) for path in paths] == [sha(b"%d" % number) for number in range(60)]


class Counting(SilentReporter):
    """Counts progress."""

    def __init__(self):
        self.tasks, self.done = [], 0

    @contextmanager
    def task(self, label, total, unit, done=0):
        self.tasks.append((label, total, unit))
        outer = self

        class Task(SilentTask):
            def advance(self, amount=1, **fields):
                outer.done += amount

        yield Task()


def test_read_all_reads_each_unknown_file_once_and_tells_how_many(memory, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    identities = HashCache(memory)
    identities.sha256(paths[0])
    reporter = Counting()
    identities.read_all([*paths, paths[1]], reporter, "Hashing")
    assert (reporter.tasks, reporter.done) == ([("Hashing", 2, "files")], 2)
    assert [identities.known(path) for path in paths] == [sha(b"a"), sha(b"b"), sha(b"c")]
    identities.read_all(paths, reporter, "Hashing")
    assert len(reporter.tasks) == 1
