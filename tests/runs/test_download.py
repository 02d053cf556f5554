"""`diffsynth download` through the real SDKs, against a hub on the loopback interface that can fail."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import modelscope_hub.config
import pytest

from diffsynth_core.sources.hub import ANOTHER_HUB
from tests.conftest import Outcome
from tests.hub_server import LoopbackHub, Trouble, sha256

MODEL = "Qwen/Qwen-Image"
DATASET = "someone/pictures"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
BYTES = random.Random(0).randbytes(700_000)
FILES = {
    SHARDS[0]: BYTES[:400_000],
    SHARDS[1]: BYTES[400_000:],
    "transformer/config.json": b'{"_class_name": "QwenImageTransformer2DModel"}',
    "text_encoder/model.safetensors": BYTES[1:90_000],
    "text_encoder/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": BYTES[2:30_000],
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"#version: 0.2",
}
"""What the recipe needs; the hub has more."""
OTHERS = {"README.md": b"#", "vae/other.safetensors": b"other", "model_index.json": b"{}"}
RECIPE = "qwen-image-lora"
TOTAL = f"{sum(map(len, FILES.values())) / 1000:.1f} kB"
REFUSED = {
    "modelscope": ("ModelScope", "models/", "modelscope login"),
    "huggingface": ("Hugging Face", "", "hf auth login"),
}
"""How a hub is called, where its pages of models lie, and the command that keeps a token."""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    pictures = {f"set/{name}.png": BYTES[:2000] for name in "abc"} | {"set/deep/d.png": b"d", "other/e.png": b"e"}
    repositories = {f"models/{MODEL}": FILES | OTHERS, f"datasets/{DATASET}": pictures}
    with LoopbackHub(repositories).serving() as serving:
        yield serving


@pytest.fixture
def environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """What leads the SDKs to the hub, with tokens in the two ways that they are given."""
    (tmp_path / "hf-token").write_text("hf_secret")
    return {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_API_TOKEN": "ms-secret",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN_PATH": str(tmp_path / "hf-token"),
        "HF_HUB_OFFLINE": "0",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "DIFFSYNTH_SKIP_DOWNLOAD": "",
        "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models"),
    }


@pytest.fixture(params=REFUSED)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def here(
    cli: Callable[..., Outcome], hub: LoopbackHub, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """`diffsynth …` in this process; what the SDKs read of the environment once is set again."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(modelscope_hub.config, "_default_config", None)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DOWNLOAD_TIMEOUT": 1}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", environment["HF_TOKEN_PATH"])
    monkeypatch.setattr("diffsynth_core.sources.fetching.BACK_OFF_SECONDS", (0.01,) * 5)
    return cli


@pytest.fixture
def download(here: Callable[..., Outcome], source: str) -> Callable[..., Outcome]:
    """`diffsynth download` in this process."""

    def run(*arguments: object) -> Outcome:
        outcome = here("download", *arguments, "--source", source)
        assert "secret" not in outcome.out + outcome.err
        assert "Traceback" not in outcome.err
        return outcome

    return run


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def folder(models: Path) -> Path:
    return models / MODEL


def files_below(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if path != ".download.lock"}


def start(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`diffsynth …` in a process of its own."""
    command = [sys.executable, "-m", "diffsynth_cli", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_fresh_download_and_a_second_one(environment, hub, source, tmp_path, folder):
    """In a process of its own, where the SDKs read the environment themselves."""
    command = ("download", RECIPE, "--source", source)
    out, err = start(environment, tmp_path, *command).communicate(timeout=60)
    assert out == f"Fetched 8 files, {TOTAL}, below `{tmp_path}/models`\n", err
    assert f"  missing     400.0 kB  {SHARDS[0]}" in err.splitlines()
    assert f"8 files, {TOTAL}: 8 missing" in err.splitlines()
    assert f"8 files in all: {TOTAL} of {TOTAL}" in err
    assert files_below(folder) == FILES
    assert any("secret" in token for token in hub.tokens) and "secret" not in out + err
    transfers = len(hub.transfers)
    again, err = start(environment, tmp_path, *command).communicate(timeout=60)
    assert again == f"All 8 files were here, below `{tmp_path}/models`\n"
    assert f"8 files, {TOTAL}: 8 here" in err
    assert len(hub.transfers) == transfers == 8


def test_the_list_alone(download, hub, source, models, folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / SHARDS[0]).write_bytes(FILES[SHARDS[0]])
    (folder / SHARDS[1]).write_bytes(FILES[SHARDS[1]][:1000])
    outcome = download(RECIPE, "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    states = {listed["path"]: (listed["state"], listed["bytes_here"]) for listed in plan["files"]}
    assert states.keys() == FILES.keys()
    assert states[SHARDS[0]] == ("here", 400_000)
    assert states[SHARDS[1]] == ("incomplete", 1000)
    assert states["tokenizer/vocab.json"] == ("missing", 0)
    assert plan["missing_bytes"] == sum(map(len, FILES.values())) - 401_000
    assert (plan["hub"], plan["base"]) == (REFUSED[source][0], str(models))
    assert hub.transfers == [] and not (models / ".download.lock").exists()
    text = download(RECIPE, "--dry_run").out.splitlines()
    assert text[0] == f"{MODEL} on {REFUSED[source][0]}, to `{folder}`"
    assert f"  incomplete  300.0 kB  {SHARDS[1]} (1.0 kB here)" in text


def test_a_connection_that_breaks_is_told_and_resumed(download, hub, folder):
    hub.troubles[SHARDS[0]] = Trouble(after=200_000, times=1)
    outcome = download(RECIPE)
    assert outcome.code == 0, outcome.err
    assert f"warning: `{SHARDS[0]}`: the connection broke" in outcome.err and "(1 of 5)" in outcome.err
    first, second = hub.starts(SHARDS[0])
    assert first == 0 and 100_000 < second <= 200_000
    assert files_below(folder) == FILES


def test_a_hub_that_answers_no_more(download, hub, folder):
    """What came is kept, the other files are there, and the next download goes on."""
    hub.troubles[SHARDS[0]] = Trouble(after=200_000, times=1)
    hub.troubles[SHARDS[1]] = Trouble(after=0, times=100)
    outcome = download(RECIPE)
    message = f"error: cannot fetch `{SHARDS[1]}` of `{MODEL}` from "
    assert outcome.code == 1 and message in outcome.err
    assert "  hint: give the same command again: it goes on where it stopped" in outcome.err
    assert len(hub.starts(SHARDS[1])) == 6
    assert {path for path in files_below(folder) if not path.endswith(".part")} == FILES.keys() - {SHARDS[1]}
    hub.troubles.clear()
    assert download(RECIPE).code == 0
    assert files_below(folder) == FILES


def test_a_stop_leaves_what_came(environment, hub, source, tmp_path, folder):
    hub.troubles[SHARDS[0]] = Trouble(pause=0.1)
    command = ("download", f"{MODEL}:transformer/*", "--source", source)
    running = start(environment, tmp_path, *command)
    part = folder / "transformer" / f".{Path(SHARDS[0]).name}.{sha256(FILES[SHARDS[0]])[:12]}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (130, ""), err
    assert err.endswith(
        "error: the download was stopped\n  hint: give the same command again: it goes on where it stopped\n"
    )
    kept = part.stat().st_size
    assert 0 < kept < 400_000 and not (folder / SHARDS[0]).exists()
    hub.troubles.clear()
    again = start(environment, tmp_path, *command)
    out, err = again.communicate(timeout=60)
    assert (again.returncode, out.split()[0]) == (0, "Fetched"), err
    assert hub.starts(SHARDS[0]) == [0, kept]
    assert (folder / SHARDS[0]).read_bytes() == FILES[SHARDS[0]] and not part.exists()


def test_a_file_cut_short_counts_as_missing_and_is_continued(download, hub, folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / SHARDS[0]).write_bytes(FILES[SHARDS[0]][:300_000])
    (folder / SHARDS[1]).write_bytes(BYTES[:1000])  # not even a beginning of the right one
    outcome = download(RECIPE)
    assert outcome.code == 0, outcome.err
    assert hub.starts(SHARDS[0]) == [300_000]
    assert hub.starts(SHARDS[1]) == [1000, 0]
    assert f"warning: `{folder / SHARDS[1]}` has other bytes than " in outcome.err
    assert files_below(folder) == FILES


def test_a_file_that_is_longer_is_replaced(download, folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / SHARDS[1]).write_bytes(FILES[SHARDS[1]] + b"more")
    assert "  damaged     300.0 kB" in download(RECIPE, "--dry_run").out
    assert download(RECIPE).code == 0
    assert files_below(folder) == FILES


@pytest.mark.parametrize("path", [SHARDS[0], "transformer/config.json"])
def test_wrong_bytes_never_get_the_name(download, hub, source, folder, path):
    """In files whose sha256 the hub tells, and in those of which Hugging Face tells the id in git."""
    hub.sent[path] = bytes(len(FILES[path]))
    outcome = download(RECIPE)
    title = REFUSED[source][0]
    message = f"error: {title} sends other bytes for `{path}` of `{MODEL}` than its hash says\n"
    assert outcome.code == 1 and message in outcome.err
    assert hub.starts(path) == [0, 0]
    assert files_below(folder) == {name: content for name, content in FILES.items() if name != path}


def test_a_model_that_the_hub_does_not_have(download, hub, source):
    title, pages, _ = REFUSED[source]
    outcome = download("someone/nothing:*.safetensors", f"{MODEL}:gone/*")
    page = f"{hub.url}/{pages}"
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        f"error: {title} has no model `someone/nothing` that you may see\n"
        f"  hint: compare with {page}someone/nothing, or {ANOTHER_HUB}\n"
        f"error: {title} has nothing that matches `{MODEL}:gone/*`; it has `README.md`, `model_index.json`, "
        "`text_encoder/`, `tokenizer/`, `transformer/` and 1 more\n"
        f"  hint: compare with {page}{MODEL}\n"
        "2 problems\n"
    )


def test_a_gated_model(download, hub, source, folder):
    """ModelScope gives no list of it, Hugging Face no file."""
    hub.refusals[f"models/{MODEL}"] = 403
    title, pages, login = REFUSED[source]
    outcome = download(f"{MODEL}:vae/diffusion_pytorch_model.safetensors")
    assert outcome.code == 1
    assert outcome.err.endswith(
        f"error: {title} does not give `{MODEL}` to you: its terms are not accepted, or it is private\n"
        f"  hint: accept the terms at {hub.url}/{pages}{MODEL}, and log in with `{login}`\n"
    )
    assert len(hub.tokens) > 0 and files_below(folder) == {}


@pytest.mark.parametrize(("status", "words"), [(401, "that you may see"), (429, "the hub answered 429")])
def test_other_answers(download, hub, source, status, words, monkeypatch):
    """Without a token, Hugging Face says 401 of a repository that it does not show; and too many may ask."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the SDKs ask for the list again, after longer and longer
    hub.refusals[f"models/{MODEL}"] = status
    outcome = download(RECIPE)
    assert outcome.code == 1
    expected = "does not give" if (source, status) == ("modelscope", 401) else words
    assert expected in outcome.err.splitlines()[-2]


def test_the_switch_of_the_sdk(download, hub, source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    outcome = download(f"{MODEL}:vae/diffusion*")
    if source == "modelscope":
        assert outcome.code == 0
    else:
        assert outcome.err == (
            "error: HF_HUB_OFFLINE forbids to ask Hugging Face\n  hint: unset it, or give `--offline`\n"
        )


def test_a_long_list_is_cut(download, hub):
    hub.repositories[f"datasets/{DATASET}"] = {f"{number:03}.png": b"x" for number in range(450)}
    lines = download("--dataset", DATASET, "--dry_run").out.splitlines()
    assert lines[60:63] == [
        "  missing          1 B  059.png",
        "  … and 390 more; `--format json` names all",
        "450 files, 450 B: 450 missing",
    ]


def test_a_hub_that_falls_silent(download, hub, source, folder, monkeypatch):
    """A connection without a byte for too long is given up, and another one goes on."""
    import modelscope_hub._legacy_api

    monkeypatch.setattr(modelscope_hub._legacy_api, "DOWNLOAD_TIMEOUT", 1)
    hub.troubles[SHARDS[0]] = Trouble(after=200_000, times=1, stall=3)
    started = time.monotonic()
    outcome = download(RECIPE)
    assert outcome.code == 0, outcome.err
    assert time.monotonic() - started < 2.9
    assert "the connection broke" in outcome.err
    assert 100_000 < hub.starts(SHARDS[0])[1] <= 200_000
    assert files_below(folder) == FILES


def test_two_processes_at_once(environment, hub, source, tmp_path, folder):
    """One downloads, the other waits, says so, and finds all here."""
    hub.troubles[SHARDS[0]] = Trouble(pause=0.05)
    command = ("download", RECIPE, "--source", source)
    both = [start(environment, tmp_path, *command) for _ in range(2)]
    ended = sorted(process.communicate(timeout=60) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert [out.split()[0] for out, _ in ended] == ["All", "Fetched"]
    assert f"Another process downloads into `{tmp_path}/models`; waiting for it" in ended[0][1]
    assert sorted(path for path, _ in hub.transfers) == sorted(FILES)
    assert files_below(folder) == FILES


def test_bytes_of_what_is_here_are_compared_when_asked_for(download, hub, source, folder):
    """A file of the right size and other bytes; a small one that Hugging Face tells the id in git of, too."""
    assert download(RECIPE).code == 0
    for path in (SHARDS[1], "tokenizer/merges.txt"):
        (folder / path).write_bytes(bytes(len(FILES[path])))
    assert f"8 files, {TOTAL}: 8 here" in download(RECIPE, "--dry_run").out
    hub.transfers.clear()
    outcome = download(RECIPE, "--verify")
    assert outcome.code == 0 and "6 here, 2 damaged" in outcome.err
    assert sorted(hub.transfers) == [("tokenizer/merges.txt", 0), (SHARDS[1], 0)]
    assert files_below(folder) == FILES


def test_a_disk_that_is_too_small(download, hub, models, monkeypatch):
    monkeypatch.setattr("diffsynth_core.sources.download_plan.free_bytes", lambda folder: 1000)
    outcome = download(RECIPE)
    assert outcome.code == 1
    assert outcome.err.endswith(
        f"error: {TOTAL} are to be fetched, and 1.0 kB are free at `{models}`\n"
        "  hint: free some space, or name a folder on another disk\n"
    )
    assert hub.transfers == []


def test_a_dataset_and_a_part_of_it(download, tmp_path):
    assert download("--dataset", DATASET, "--include", "set/*").code == 0
    assert files_below(Path("data/pictures")).keys() == {"set/a.png", "set/b.png", "set/c.png", "set/deep/d.png"}
    assert download("--dataset", DATASET, "--local-dir", tmp_path / "mine").code == 0
    assert "other/e.png" in files_below(tmp_path / "mine")


def test_a_folder_named_goes_over_the_environment(download, tmp_path):
    assert download(f"{MODEL}:vae/diffusion*", "--local_model_path", tmp_path / "mine").code == 0
    found = files_below(tmp_path / "mine" / MODEL)
    assert found == {path: FILES[path] for path in ["vae/diffusion_pytorch_model.safetensors"]}


def test_hashes_are_remembered_for_runs(download, folder, tmp_path):
    from diffsynth_core.sources.identity import FileIdentities

    download(RECIPE)
    identities = FileIdentities(tmp_path / "cache/diffsynth/identities.jsonl")
    assert identities.known(folder / SHARDS[0]) == sha256(FILES[SHARDS[0]])


SETTINGS = ("--recipe", RECIPE, "--device", "cpu", "--dataset_num_workers", 0, "--max_steps", 1, "--lora_rank", 2)
"""A short LoRA run of the recipe."""


def test_train_brings_what_it_lacks(here, hub, tiny_models, photographs, folder, monkeypatch):
    """It lists the files with their sizes first, then trains; of what is here already nothing is fetched again."""
    content = files_below(tiny_models / MODEL)
    hub.repositories[f"models/{MODEL}"] = content
    kept = "vae/diffusion_pytorch_model.safetensors"
    (folder / "vae").mkdir(parents=True)
    (folder / kept).write_bytes(content[kept])
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    outcome = here("train", *SETTINGS, "--dataset_base_path", photographs)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Checkpoint  ")
    listed, trained = outcome.err.index(f"{MODEL} on Hugging Face"), outcome.err.index("Qwen-Image on cpu")
    assert listed < trained and f"  {kept}" in outcome.err
    assert hub.starts(kept) == [] and hub.starts("vae/config.json") == [0]
    assert files_below(folder) == {path: data for path, data in content.items() if not path.endswith(".index.json")}


def test_train_brings_nothing_for_a_command_that_is_refused(here, hub, tmp_path, models):
    outcome = here("train", *SETTINGS, "--dataset_base_path", tmp_path / "nowhere")
    assert (outcome.code, outcome.out) == (1, "")
    assert "nowhere` (`dataset_base_path`) is not there" in outcome.err
    assert "`diffsynth download qwen-image-lora`" in outcome.err
    assert hub.requests.total() == 0 and not models.exists()


def test_a_dry_run_of_train_brings_nothing(here, hub, photographs, models):
    outcome = here("train", *SETTINGS, "--dataset_base_path", photographs, "--dry_run")
    assert outcome.code == 1
    assert "(not here, 40.9 GB as published" in outcome.out
    assert outcome.err.count("fetch it with `diffsynth download qwen-image-lora`") == 3
    assert hub.requests.total() == 0 and not models.exists()
