"""Files are read ahead of their use, beside other work, and those of the component that is loaded next."""

import os
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training import encode, read_ahead
from diffsynth_core.training.read_ahead import ReadAhead
from diffsynth_core.training.setup import make_accelerator


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe in the place of a file: who writes to it waits for who reads it."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_files_are_read_beside_other_work(pipe, tmp_path):
    with ReadAhead() as ahead:
        ahead.begin([tmp_path / "missing"])
        ahead.begin([pipe])
        with pipe.open("wb") as stream:
            assert stream.write(bytes(1 << 20)) == 1 << 20, "more than a pipe holds"


def test_reading_ends_with_the_block():
    with ReadAhead() as ahead:
        ahead.begin([Path("/dev/zero")])


def test_files_larger_than_memory_are_not_read(pipe, monkeypatch):
    monkeypatch.setattr(read_ahead, "available_bytes", lambda: -1)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    os.write(descriptor, b"content")
    with ReadAhead() as ahead:
        ahead.begin([pipe])
    assert os.read(descriptor, 10) == b"content"
    os.close(descriptor)


def test_while_a_component_encodes_the_next_one_is_read(tiny_models, photographs, tmp_path, monkeypatch):
    flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "device": "cpu", "lora_rank": 2,
             "dataset_num_workers": 0, "output_path": str(tmp_path / "out"), "cache_path": str(tmp_path / "cache")}  # fmt: skip
    plan = with_encodings(make_plan(resolve(flags), SilentReporter(), base=tiny_models), SilentReporter())
    of_files = {files.paths: name for name, files in plan.model.components.items()}
    done: list[tuple[str, str]] = []
    load, begin, encode_with = encode.load_for_run, ReadAhead.begin, encode._encode

    def record(what, name, function):
        def recorded(*arguments):
            done.append((what, name(arguments)))
            return function(*arguments)

        return recorded

    monkeypatch.setattr(encode, "load_for_run", record("load", lambda given: given[2], load))
    monkeypatch.setattr(encode, "_encode", record("encode", lambda given: given[1].encoder.component, encode_with))
    monkeypatch.setattr(ReadAhead, "begin", record("read", lambda given: of_files[tuple(given[1])], begin))
    encode.fill_cache(plan, load_family(plan.model.facts.name), make_accelerator(plan), SilentReporter(), StopRequest())
    first, second = plan.encodings.components_to_load
    assert done == [
        ("load", first), ("read", second), ("encode", first),
        ("load", second), ("read", plan.model.facts.denoiser), ("encode", second),
    ]  # fmt: skip
