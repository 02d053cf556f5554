"""A hub on the loopback interface, and `diffsynth download` against it through the real SDKs."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import modelscope_hub.config
import pytest

from tests.hub_server import LoopbackHub
from tests.outcome import Outcome

MODEL = "Qwen/Qwen-Image"
DATASET = "someone/images"
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
"""Files that the recipe requires; the hub has more."""
OTHERS = {"README.md": b"#", "vae/other.safetensors": b"other", "model_index.json": b"{}"}
RECIPE = "qwen-image-lora"
TOTAL = f"{sum(map(len, FILES.values())) / 1000:.1f} kB"
ANOTHER = {
    "modelscope": "use another hub with `--source huggingface`",
    "huggingface": "use another hub with `--source modelscope`",
}
"""Hint about another hub if the command named the hub."""
REFUSED = {
    "modelscope": ("ModelScope", "models/", "modelscope login"),
    "huggingface": ("Hugging Face", "", "hf auth login"),
}
"""Title of a hub, URL of its model pages, and the command that stores a token."""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    images = {f"set/{name}.png": BYTES[:2000] for name in "abc"} | {"set/deep/d.png": b"d", "other/e.png": b"e"}
    repositories = {f"models/{MODEL}": FILES | OTHERS, f"datasets/{DATASET}": images}
    with LoopbackHub(repositories).serving() as serving:
        yield serving


@pytest.fixture
def environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """Variables that direct the SDKs to the hub, with tokens in both ways of setting them."""
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
    """Run `diffsynth …` in this process; values that the SDKs read from the environment once are set again."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(modelscope_hub.config, "_default_config", None)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DOWNLOAD_TIMEOUT": 1}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", environment["HF_TOKEN_PATH"])
    monkeypatch.setattr("diffsynth_core.hub.fetching.BACK_OFF_SECONDS", (0.01,) * 5)
    return cli


@pytest.fixture
def download(here: Callable[..., Outcome], source: str) -> Callable[..., Outcome]:
    """Run `diffsynth download` in this process."""

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
    """Return all files but the lock."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if path != ".download.lock"}


def start(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run `diffsynth …` in a separate process."""
    command = [sys.executable, "-m", "diffsynth_cli", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
