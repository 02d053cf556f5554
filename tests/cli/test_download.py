"""`diffsynth download` without a hub: wrong use, and missing files."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import read_problems

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


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], ("nothing to download", "pass a recipe, MODEL_ID:GLOB, or `--dataset ID`")),
        (
            ["qwen-image-lra"],
            ("`qwen-image-lra` is neither a recipe nor MODEL_ID:GLOB", "did you mean `qwen-image-lora`?"),
        ),
        (
            ["someone/model"],
            (
                "`someone/model` is neither a recipe nor MODEL_ID:GLOB",
                "pass `someone/model:GLOB`, or `--dataset someone/model`",
            ),
        ),
        (["??"], ("`??` is neither a recipe nor MODEL_ID:GLOB", "see `diffsynth recipe list`")),
        (
            ["qwen-image-lora", "--dataset", "a/b"],
            ("models and a dataset cannot be downloaded together", "download them with two commands"),
        ),
        (
            ["qwen-image-lora", "--local-dir", "x"],
            ("`--local_dir` is for datasets", "use `--local_model_path` for models, MODEL_ID:GLOB to select files"),
        ),
        (
            ["--dataset", "a/b", "--local_model_path", "x"],
            ("`--local_model_path` is for models", "use `--local_dir`"),
        ),
        (["../x:*"], ("`../x` is not a valid name of a model on a hub", "write it as `owner/name`")),
        (["/:*"], ("`/` is not a valid name of a model on a hub", "write it as `owner/name`")),
        (["--dataset", "a/.."], ("`a/..` is not a valid name of a dataset on a hub", "write it as `owner/name`")),
        (["--dataset", "a/b/"], ("`a/b/` is not a valid name of a dataset on a hub", "write it as `owner/name`")),
        (
            ["qwen-image-lora", "--source", "civitai", "--no_offline"],
            ("`source` is `civitai`, which is not a known hub", "use one of modelscope, huggingface"),
        ),
    ],
)
def test_wrong_use(cli, no_socket, arguments, problem):
    outcome = cli("download", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert read_problems(outcome.err) == [problem]


def test_all_that_is_wrong_is_told_at_once(cli, no_socket):
    outcome = cli("download", "qwen-image-lra", "nothing", "--include", "*")
    assert outcome.code == 2 and len(read_problems(outcome.err)) == 3


def test_a_hub_in_the_environment_that_is_none(cli, no_socket, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "civitai")
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")
    message = "`DIFFSYNTH_DOWNLOAD_SOURCE` is `civitai`, which is not a known hub"
    assert read_problems(cli("download", "qwen-image-lora").err)[0][0] == message


@pytest.mark.parametrize("arguments", [(), ("--offline",)])
def test_offline_says_what_is_missing_and_how_to_get_it(cli, no_socket, arguments, monkeypatch, tmp_path):
    """With the option, and with `DIFFSYNTH_SKIP_DOWNLOAD`, which is set for all tests."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "none"))
    if arguments:
        monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")
    outcome = cli("download", "qwen-image-lora", *arguments)
    hint = "download it with `diffsynth download qwen-image-lora` where a hub can be accessed"
    assert (outcome.code, outcome.out) == (1, "")
    assert read_problems(outcome.err) == [
        (f"no complete file matches `{item}` below `{tmp_path}/none`", hint) for item in MISSING
    ]


def test_offline_names_the_command_that_was_given(cli, no_socket):
    entry = f"{MODEL}:gone/*.safetensors"
    [(_, hint)] = read_problems(cli("download", entry, "--local-model-path", "some where").err)
    command = f"diffsynth download '{entry}' --local_model_path 'some where'"
    assert hint == f"download it with `{command}` where a hub can be accessed"
    [(_, hint)] = read_problems(cli("download", "--dataset", "a/b", "--include", "x/*").err)
    assert hint == "download it with `diffsynth download --dataset a/b --include 'x/*'` where a hub can be accessed"


def test_offline_with_all_here(cli, no_socket, tiny_models):
    outcome = cli("download", "qwen-image-lora")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"All files are present below `{tiny_models}`, judging by their names\n"


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
                f"`model_id_with_origin_paths`: nothing matches `{entry}` below `{models}`",
                "download it with `diffsynth download qwen-image-lora`, set DIFFSYNTH_MODEL_BASE_PATH to where it is, "
                "or rehearse with `--rehearse`",
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
