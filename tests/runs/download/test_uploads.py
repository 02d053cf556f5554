"""Runs that upload their checkpoints, through the real SDKs to a hub on the loopback interface."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import HfApi

from diffsynth_core.training.observers import background
from tests.conftest import MODEL_ID
from tests.hub_server import sha256

REPOSITORY = "alice/keyhole"
SMALL = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--device", "cpu",
         "--dataset_repeat", "10", "--save_steps", "2", "--resume", "auto")  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""huggingface_hub (2.4) sends objects of Git LFS as `data=`, which its HTTP library deprecates."""


@pytest.fixture
def train(here, hub, environment, photographs, tiny_models, source, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Train with the checkpoints going to the hub; return the exit code and what was said."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", source)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not served here
    hub.accounts = {"hf_secret": ["alice", "studio"], "ms-secret": ["alice", "studio"]}

    def run(*flags: object) -> tuple[int, str]:
        data = ("--dataset_base_path", photographs, "--push_to_hub", REPOSITORY)
        outcome = here("train", *SMALL, *data, "--output_path", "out", *flags)
        assert "secret" not in outcome.out + outcome.err and "Traceback" not in outcome.err
        return outcome.code, " ".join(outcome.err.split())

    return run


def card_of(files: dict[str, bytes]) -> tuple[dict[str, object], str]:
    """The metadata and the text of a model card."""
    _, head, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


def test_each_checkpoint_is_uploaded_with_a_card(train, hub):
    code, said = train("--max_steps", 4, "--validation_split", 0.25, "--ema_decay", 0.9)
    assert code == 0, said
    files = hub.repositories[f"models/{REPOSITORY}"]
    names = {f"step-{step}{kind}.safetensors" for step in (2, 4) for kind in ("", ".ema")}
    assert files.keys() == {"README.md", *names}, said
    assert all(files[path.name] == path.read_bytes() for path in Path("out").glob("*.safetensors"))
    assert not hub.public
    assert hub.commits[-1] == (REPOSITORY, "Step 4 of 4") and len(hub.commits) <= 3
    head, text = card_of(files)
    assert head == {
        "base_model": [MODEL_ID],
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffsynth", "qwen-image", "lora"],
    }
    for line in ("# keyhole", "| steps | 4 of 4 |", "| training samples | 3 |", "| `lora_rank` | `2` |",
                 "| `step-4.ema.safetensors` (averaged weights) | 4 | 0 | |"):  # fmt: skip
        assert line in text.splitlines()
    losses = [json.loads(line)["loss"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert f"| loss | {sum(losses) / 4:.4f} (mean of 4 steps) |" in text
    entry = json.loads(Path("out/run.json").read_text())["checkpoints"][-1]
    assert f"| validation loss | {entry['validation_loss']:.4f} |" in text


def test_a_resumed_run_sends_nothing_twice(train, hub):
    assert train("--max_steps", 2)[0] == 0
    hub.blobs = dict(hub.blobs)
    sent = set(hub.blobs)
    assert train("--max_steps", 4)[0] == 0
    assert set(hub.blobs) - sent == {sha256(Path("out/step-4.safetensors").read_bytes())}


def test_nothing_of_this_machine_is_in_the_card(train, hub, tmp_path):
    """Paths, the user, tokens, prompts; previews are shown."""
    (tmp_path / "home of bob|`").mkdir()
    Path(tmp_path / "home of bob|`/held.csv").write_text("image,prompt\nchelsea.png,a secret cat of bob\n")
    split = ("--validation_split", tmp_path / "home of bob|`/held.csv")
    code, said = train("--max_steps", 2, *split, "--cache_path", tmp_path / "bob", "--lora_target_modules", "to_q,to_k",
                       "--preview_prompts", "a cat of bob", "--preview_steps", 1)  # fmt: skip
    assert code == 0, said
    files = hub.repositories[f"models/{REPOSITORY}"]
    card = files["README.md"].decode()
    for word in (str(tmp_path), "bob", "secret", "photographs", "/tmp", "home", "cat"):
        assert word not in card, word
    assert "| `validation_split` | `held.csv` |" in card and "| `lora_target_modules` | `to_q, to_k` |" in card
    assert "![Previews of the run](previews.jpg)" in card and b"bob" not in files["previews.jpg"]
    header = files["step-2.safetensors"][:4000]
    assert b"bob" not in header and str(tmp_path).encode() not in header


def test_a_hub_that_fails_ends_no_run_and_gets_the_next_checkpoint(train, hub, monkeypatch):
    real = background.BackgroundObserver.on_step

    def on_step(observer, report):
        hub.refusals = {f"models/{REPOSITORY}": 403} if report.step <= 4 else {}
        while report.step in (3, 5) and not observer.wait(60):
            pass
        real(observer, report)

    monkeypatch.setattr(background.BackgroundObserver, "on_step", on_step)
    code, said = train("--max_steps", 6)
    assert code == 0, said
    assert said.count("does not let you write") == 1
    assert re.search(rf"Updated `{REPOSITORY}` on (ModelScope|Hugging Face) after an outage", said)
    files = hub.repositories[f"models/{REPOSITORY}"]
    assert files.keys() == {"README.md", "step-2.safetensors", "step-4.safetensors", "step-6.safetensors"}


@pytest.mark.parametrize("source", ["huggingface"], indirect=True)
def test_a_checkpoint_that_the_run_deletes_while_it_is_sent_arrives_whole(train, hub, monkeypatch):
    real = HfApi.create_commit

    def create_commit(*given, **named):
        for path in Path("out").glob("*.safetensors"):
            path.unlink()
        return real(*given, **named)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    code, said = train("--max_steps", 2)
    assert code == 0, said
    [entry] = json.loads(Path("out/run.json").read_text())["checkpoints"]
    assert sha256(hub.repositories[f"models/{REPOSITORY}"]["step-2.safetensors"]) == entry["sha256"]


def test_what_is_left_to_upload_is_told(train, hub, source, monkeypatch):
    monkeypatch.setattr(
        background.BackgroundObserver, "on_step", lambda *_: hub.refusals.update({f"models/{REPOSITORY}": 403})
    )
    code, said = train("--max_steps", 2)
    program = {"modelscope": "modelscope", "huggingface": "hf"}[source]
    assert code == 0
    assert f"lacks what was saved last; upload it with `{program} upload {REPOSITORY} out/step-2.safetensors " in said


def test_a_token_that_is_missing_or_wrong(train, hub, environment, source):
    hub.accounts = {"other": ["alice"]}
    code, said = train("--max_steps", 2, "--lora_rank", 0)
    assert code == 2 and "no valid token" in said and "2 problems" in said
    login = {"modelscope": "modelscope login", "huggingface": "hf auth login"}[source]
    assert f"`{login}`" in said
    assert not Path("out").exists() and f"models/{REPOSITORY}" not in hub.repositories


@pytest.mark.parametrize("source", ["huggingface"], indirect=True)
def test_a_token_without_the_right_to_write(train, hub):
    hub.role = "read"
    code, said = train("--max_steps", 2)
    assert code == 1 and "your token may only read" in said
    hub.role, hub.accounts = "write", {"hf_secret": ["bob"]}
    code, said = train("--max_steps", 2)
    assert code == 1 and "it belongs neither to `bob` nor to an organization of it" in said
    assert f"models/{REPOSITORY}" not in hub.repositories


def test_a_repository_that_may_not_be_created(train, hub):
    hub.refusals = {f"models/{REPOSITORY}": 403}
    code, said = train("--max_steps", 2)
    assert code == 1 and f"does not let you write to `{REPOSITORY}`" in said
    assert "Loading" not in said and not Path("out").exists()


def test_a_public_repository_is_only_used_when_asked_for(train, hub):
    hub.repositories[f"models/{REPOSITORY}"] = {}
    hub.public.add(f"models/{REPOSITORY}")
    code, said = train("--max_steps", 2)
    assert code == 1 and f"`{REPOSITORY}` on " in said and "is public" in said and "--hub_public" in said
    assert train("--max_steps", 2, "--hub_public")[0] == 0
    assert "step-2.safetensors" in hub.repositories[f"models/{REPOSITORY}"]


def test_a_public_repository_is_created_when_asked_for(train, hub):
    assert train("--max_steps", 2, "--hub_public")[0] == 0
    assert hub.public == {f"models/{REPOSITORY}"}


@pytest.mark.parametrize("source", ["huggingface"], indirect=True)
def test_offline(train, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, said = train("--max_steps", 2)
    assert code == 1 and "HF_HUB_OFFLINE is set" in said and "remove `--push_to_hub`" in said


def test_a_dry_run_and_a_rehearsal_ask_no_hub(train, hub):
    code, said = train("--dry_run")
    assert code == 0, said
    code, said = train("--rehearse", "--max_steps", 2, "--output_path", "tried")
    assert "The rehearsal does not use `push_to_hub`" in said
    assert not hub.requests and f"models/{REPOSITORY}" not in hub.repositories
