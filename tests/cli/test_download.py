"""`diffsynth download` without a hub: wrong use, and missing files."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import read_problems
from tests.naming import names

MODEL = "Qwen/Qwen-Image"
MISSING = (
    f"{MODEL}:transformer/diffusion_pytorch_model*.safetensors",
    f"{MODEL}:text_encoder/model*.safetensors",
    f"{MODEL}:vae/diffusion_pytorch_model.safetensors",
    f"{MODEL}:tokenizer/*",
)


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make opening a socket fail."""

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


WRONG = [
    ([], ("nothing to download", names("MODEL_ID:GLOB", "--dataset ID"))),
    (["qwen-image-lra"], (names("qwen-image-lra", "neither", "MODEL_ID:GLOB"), names("qwen-image-lora"))),
    (
        ["someone/model"],
        (
            names("someone/model", "neither", "MODEL_ID:GLOB"),
            names("someone/model:GLOB", "--dataset someone/model"),
        ),
    ),
    (["??"], (names("??", "neither", "MODEL_ID:GLOB"), names("diffsynth recipe list"))),
    (["qwen-image-lora", "--dataset", "a/b"], (names("models and a dataset"), names("two commands"))),
    (
        ["qwen-image-lora", "--local-dir", "x"],
        (names("--local_dir", "for datasets"), names("--local_model_path", "MODEL_ID:GLOB")),
    ),
    (
        ["--dataset", "a/b", "--local_model_path", "x"],
        (names("--local_model_path", "for models"), names("--local_dir")),
    ),
    (["../x:*"], (names("../x", "model"), names("owner/name"))),
    (["/:*"], (names("`/`", "model"), names("owner/name"))),
    (["--dataset", "a/.."], (names("a/..", "dataset"), names("owner/name"))),
    (["--dataset", "a/b/"], (names("`a/b/`", "dataset"), names("owner/name"))),
    (
        ["qwen-image-lora", "--source", "civitai", "--no_offline"],
        (names("source", "civitai"), names("modelscope, huggingface")),
    ),
]
"""(arguments, (message, hint))."""


@pytest.mark.parametrize(("arguments", "problem"), WRONG, ids=[" ".join(words) or "nothing" for words, _ in WRONG])
def test_wrong_use(says, cli, no_socket, arguments, problem):
    outcome = cli("download", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    says(outcome)
    assert read_problems(outcome.err) == [problem]


def test_all_that_is_wrong_is_told_at_once(says, cli, no_socket):
    outcome = cli("download", "qwen-image-lra", "nothing", "--include", "*")
    says(outcome)
    assert outcome.code == 2 and len(read_problems(outcome.err)) == 3


def test_a_hub_in_the_environment_that_is_none(says, cli, no_socket, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "civitai")
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")
    message = names("DIFFSYNTH_DOWNLOAD_SOURCE", "civitai")
    outcome = cli("download", "qwen-image-lora")
    says(outcome)
    assert read_problems(outcome.err)[0][0] == message


@pytest.mark.parametrize("arguments", [(), ("--offline",)])
def test_offline_says_what_is_missing_and_how_to_get_it(says, cli, no_socket, arguments, monkeypatch, tmp_path):
    """With the option, and with `DIFFSYNTH_SKIP_DOWNLOAD`, which is set for all tests."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "none"))
    if arguments:
        monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")
    outcome = cli("download", "qwen-image-lora", *arguments)
    hint = names("diffsynth download qwen-image-lora")
    assert (outcome.code, outcome.out) == (1, "")
    says(outcome)
    assert read_problems(outcome.err) == [
        (names("no complete file", item, f"{tmp_path}/none"), hint) for item in MISSING
    ]


def test_offline_names_the_command_that_was_given(says, cli, no_socket):
    entry = f"{MODEL}:gone/*.safetensors"
    [(_, hint)] = read_problems(cli("download", entry, "--local-model-path", "some where").err)
    says(hint)
    assert hint == names(f"diffsynth download '{entry}' --local_model_path 'some where'")
    [(_, hint)] = read_problems(cli("download", "--dataset", "a/b", "--include", "x/*").err)
    assert hint == names("diffsynth download --dataset a/b --include 'x/*'")


def test_offline_with_all_here(says, cli, no_socket, tiny_models):
    outcome = cli("download", "qwen-image-lora")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == names("All files", tiny_models)
    says(outcome)


def test_offline_a_missing_shard_and_a_copy(cli, no_socket, models, tiny_wan, monkeypatch):
    """A shard implied by the names of others is missing; a mirror replaces the original."""
    repository = models / MODEL
    (repository / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    outcome = cli("download", "qwen-image-lora", "--format", "json")
    assert outcome.code == 1
    states = {item["wanted"]: item["state"] for item in json.loads(outcome.out)["wanted"]}
    assert states == dict.fromkeys(MISSING, "here") | {MISSING[0]: "missing"}
    entry = "Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth"
    copy = models / "DiffSynth-Studio/Wan-Series-Converted-Safetensors/Wan2.1_VAE.safetensors"
    assert cli("download", entry).code == 1
    copy.parent.mkdir(parents=True)
    shutil.copy(next(Path(tiny_wan).rglob("Wan2.1_VAE.*")), copy)
    assert cli("download", entry).code == 0


def test_train_opens_no_socket_when_downloads_are_off(refuse, models, no_socket):
    shutil.rmtree(models / MODEL / "vae")
    entry = f"{MODEL}:vae/diffusion_pytorch_model.safetensors"
    assert refuse() == (
        1,
        [
            (
                names("model_id_with_origin_paths", "nothing", entry, models),
                names("diffsynth download qwen-image-lora", "DIFFSYNTH_MODEL_BASE_PATH", "--rehearse"),
            )
        ],
    )


def test_no_torch_and_no_terminal_library_for_offline_and_for_both_hubs():
    """The SDKs are imported only for a download, and import no torch."""
    offline = "from diffsynth_cli.main import main; main(['download', 'wan2.2-i2v-a14b-lora'])"
    hubs = "from diffsynth_core.hub.client import HUBS, open_hub; [open_hub(source) for source in HUBS]"
    for code, banned in (
        (offline, {"torch", "modelscope_hub", "huggingface_hub", "rich"}),
        (hubs, {"torch", "modelscope"}),
    ):
        listing = f"import sys; {code}; print('MODULES', *(name for name in sys.modules if '.' not in name))"
        ended = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
        imported = set(ended.stdout.partition("MODULES")[2].split())
        assert "diffsynth_core" in imported and imported & banned == set()
