"""Damaged cached encodings: encoded again with a warning, or reported if no encoder is loaded; never used."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.planning.data.encodings import plan_encodings
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train

FLAGS = {
    "recipe": "qwen-image-lora", "dataset_num_workers": "0", "dataset_repeat": "1", "num_epochs": "1", "lora_rank": "2",
    "lora_target_modules": "to_q", "learning_rate": "0.01", "device": "cpu",
}  # fmt: skip
NOBODY = 65534


@dataclass(frozen=True)
class Trained:
    """A run that filled a cache."""

    plan: RunPlan
    cache: Path
    command: tuple[object, ...]

    def copy(self, cache: Path) -> RunPlan:
        """Return the plan of the run with a copy of its cache."""
        shutil.copytree(self.cache, cache)
        return replace(self.plan, output=replace(self.plan.output, cache=cache))

    def entries(self, encoder: str, cache: Path | None = None) -> list[Path]:
        folder = (cache or self.cache) / "encodings" / "qwen-image" / encoder
        return sorted(folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def trained(tiny_models: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = tmp_path_factory.mktemp("encodings")
    flags = FLAGS | {"dataset_base_path": str(photographs), "cache_path": str(base / "cache")}
    plan = make_plan(resolve(flags | {"output_path": str(base / "run")}), SilentReporter(), base=tiny_models)
    train(plan, SilentReporter(), StopRequest())
    words = [word for name, value in FLAGS.items() for word in (f"--{name}", value)]
    return Trained(plan, base / "cache", ("train", *words, "--dataset_base_path", photographs))


def flip(place: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_another(path: Path) -> None:
    others = (other for other in path.parents[1].rglob("*.safetensors") if other != path)
    path.write_bytes(next(others).read_bytes())


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"bit flip at {place}": flip(place) for place in (0, 0.02, 0.1, 0.5, 0.9, 1)},
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": put_folder,
    "zeros at its end": lambda path: path.write_bytes(path.read_bytes()[:-64] + bytes(64)),
    "of another sample": put_another,
    "missing": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("encoder", ["text", "latents"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_anew(trained, tmp_path, encoder, damage):
    plan = trained.copy(tmp_path / "cache")
    assert plan_encodings(plan, SilentReporter()).components_to_load == ()
    entry = trained.entries(encoder, tmp_path / "cache")[1]
    damage(entry)
    for part in plan_encodings(plan, SilentReporter()).encoders:
        found = [part.cache.path(part.keys[index]) for index in part.missing]
        assert found == ([entry] if part.encoder.name == encoder else [])
        assert part.damaged == (part.missing if entry.exists() else ())
    with pytest.raises(DiffSynthError, match=entry.name):
        EncodingCache(entry.parents[1]).read(entry.stem)


def test_a_run_makes_a_damaged_entry_anew_and_says_so(trained, tmp_path, cli, says):
    trained.copy(tmp_path / "cache")
    entry = trained.entries("latents", tmp_path / "cache")[1]
    whole = entry.read_bytes()
    flip(0.9)(entry)
    common = (*trained.command, "--cache_path", tmp_path / "cache", "--output_path", "out")
    printed = cli(*common, "--dry_run", "--verbose")
    lines = [line for line in printed.out.splitlines() if "encodings are in the cache" in line]
    outcome = cli(*common)
    assert outcome.code == 0, outcome.err
    assert entry.read_bytes() == whole
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ") and ".safetensors" in line]
    assert len(warnings) == 1 and str(entry) in warnings[0]
    says("\n".join([*lines, *warnings]))
    assert (Path("out") / "epoch-0.safetensors").read_bytes() == (
        trained.plan.parameters.output_path / "epoch-0.safetensors"
    ).read_bytes()


def test_an_encoded_folder_is_repaired_by_the_first_half(trained, tmp_path, cli, says):
    cache = ("--cache_path", tmp_path / "cache")
    first = (*trained.command, *cache, "--task", "sft:data_process", "--output_path", "encoded")
    assert cli(*first).code == 0
    shutil.rmtree(tmp_path / "cache")
    entry = sorted(Path("encoded/encodings/latents").rglob("*.safetensors"))[0]
    whole = entry.read_bytes()
    flip(0.9)(entry)
    second = (*trained.command, *cache, "--task", "sft:train", "--dataset_base_path", "encoded", "--output_path", "out")
    refused = cli(*second)
    assert refused.code == 1 and str(entry) in refused.err
    printed = [line for line in refused.err.splitlines() if line.startswith(("error: ", "  hint: "))]
    says("\n".join(printed))
    assert not Path("out/run.json").exists()
    repaired = cli(*first)
    assert repaired.code == 0, repaired.err
    assert entry.read_bytes() == whole
    assert cli(*second).code == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("lacking", [False, True], ids=["complete", "an entry less"])
def test_a_cache_that_can_only_be_read_is_used_when_it_is_complete(trained, tiny_models, photographs, lacking):
    """In a process of an unprivileged user; root may write anywhere."""
    with tempfile.TemporaryDirectory() as base:
        for source, name in ((trained.cache, "cache"), (tiny_models, "models"), (photographs, "photographs")):
            shutil.copytree(source, Path(base, name))
        cache = Path(base, "cache")
        if lacking:
            trained.entries("text", cache)[0].unlink()
        for path in (Path(base), *Path(base).rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(base, "out").mkdir(mode=0o777)
        Path(base, "out").chmod(0o777)
        words = (
            *trained.command[:-1],
            f"{base}/photographs",
            "--cache_path",
            cache,
            "--output_path",
            f"{base}/out/run",
        )
        before = sorted(cache.rglob("*"))
        code, said = _as_nobody(words, Path(base, "models"))
        assert sorted(cache.rglob("*")) == before
        if lacking:
            assert code == 1 and f"error: `cache_path` `{cache}` is not writable: `{cache}` is read-only" in said
        else:
            assert code == 0, said


def _as_nobody(words: tuple[object, ...], models: Path) -> tuple[int, str]:
    """Run a command as an unprivileged user in a fork of this process; return exit code and messages."""
    from diffsynth_cli.main import main

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1), os.dup2(writer, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ["DIFFSYNTH_MODEL_BASE_PATH"] = str(models)
        if os.getuid() == 0:
            os.setgid(NOBODY), os.setuid(NOBODY)
        code = 99
        try:
            code = main([str(word) for word in words])
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
