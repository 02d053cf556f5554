"""`diffsynth download` through the real SDKs, against a hub on the loopback interface that fails or denies access."""

import signal
import socket
import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.cli.conftest import read_problems
from tests.hub_server import Trouble, sha256
from tests.runs.download.conftest import (
    ANOTHER,
    BYTES,
    FILES,
    MODEL,
    RECIPE,
    REFUSED,
    SHARDS,
    TOTAL,
    files_below,
    start,
)
from tests.waiting import alive, wait_until


def test_a_connection_that_breaks_is_told_and_resumed(download, hub, folder):
    hub.troubles[SHARDS[0]] = Trouble(after=200_000, times=1)
    outcome = download(RECIPE)
    assert outcome.code == 0, outcome.err
    assert f"warning: `{SHARDS[0]}`: the connection was lost" in outcome.err and "(1 of 5)" in outcome.err
    first, second = hub.starts(SHARDS[0])
    assert first == 0 and 100_000 < second <= 200_000
    assert files_below(folder) == FILES


def test_a_hub_that_answers_no_more(download, hub, folder):
    """Received bytes are kept, the other files are complete, and the next download resumes."""
    hub.troubles[SHARDS[0]] = Trouble(after=200_000, times=1)
    hub.troubles[SHARDS[1]] = Trouble(after=0, times=100)
    outcome = download(RECIPE)
    message = f"error: cannot download `{SHARDS[1]}` of `{MODEL}` from "
    assert outcome.code == 1 and message in outcome.err
    assert "  hint: run the command again to resume the download" in outcome.err
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
    wait_until(lambda: alive(running) and part.exists() and part.stat().st_size)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (130, ""), err
    assert err.endswith("The download was interrupted; run the command again to resume it\n")
    kept = part.stat().st_size
    assert 0 < kept < 400_000 and not (folder / SHARDS[0]).exists()
    hub.troubles.clear()
    again = start(environment, tmp_path, *command)
    out, err = again.communicate(timeout=60)
    assert (again.returncode, out.split()[0]) == (0, "Downloaded"), err
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
    assert f"warning: `{folder / SHARDS[1]}`: checksum mismatch with " in outcome.err
    assert files_below(folder) == FILES


def test_a_file_that_is_longer_is_replaced(download, folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / SHARDS[1]).write_bytes(FILES[SHARDS[1]] + b"more")
    assert "  damaged     300.0 kB" in download(RECIPE, "--dry_run").out
    assert download(RECIPE).code == 0
    assert files_below(folder) == FILES


@pytest.mark.parametrize("path", [SHARDS[0], "transformer/config.json"])
def test_wrong_bytes_never_get_the_name(download, hub, source, folder, path):
    """For files with a sha256, and for those with a git blob id on Hugging Face."""
    hub.sent[path] = bytes(len(FILES[path]))
    outcome = download(RECIPE)
    title = REFUSED[source][0]
    message = f"error: checksum mismatch for `{path}` of `{MODEL}` from {title}\n"
    assert outcome.code == 1 and message in outcome.err
    assert hub.starts(path) == [0, 0]
    assert files_below(folder) == {name: content for name, content in FILES.items() if name != path}


def test_a_model_that_the_hub_does_not_have(download, hub, source):
    title, pages, login = REFUSED[source]
    outcome = download("someone/nothing:*.safetensors", f"{MODEL}:gone/*")
    page = f"{hub.url}/{pages}"
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        f"Requesting the file list from {title}\n"
        f"error: {title} has no model `someone/nothing` that you have access to\n"
        f"  hint: check {page}someone/nothing, log in with `{login}` if it is private, or {ANOTHER[source]}\n"
        f"error: {title} has no file that matches `{MODEL}:gone/*`; it has `README.md`, `model_index.json`, "
        "`text_encoder/`, `tokenizer/`, `transformer/` and 1 more\n"
        f"  hint: check {page}{MODEL}\n"
        "2 problems\n"
    )


def test_a_gated_model(download, hub, source, folder):
    """ModelScope provides no list of it, Hugging Face no files."""
    hub.refusals[f"models/{MODEL}"] = 403
    title, pages, login = REFUSED[source]
    outcome = download(f"{MODEL}:vae/diffusion_pytorch_model.safetensors")
    assert outcome.code == 1
    assert outcome.err.endswith(
        f"error: {title} denied access to `{MODEL}`: its license is not accepted, or it is private\n"
        f"  hint: accept the license at {hub.url}/{pages}{MODEL}, and log in with `{login}`\n"
    )
    assert len(hub.tokens) > 0 and files_below(folder) == {}


@pytest.mark.parametrize(
    ("status", "words"), [(401, "that you have access to"), (429, "the hub responded with status 429")]
)
def test_other_answers(download, hub, source, status, words, monkeypatch):
    """Without a token, Hugging Face responds with 401 for hidden repositories; and with 429 to too many requests."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the SDKs ask for the list again, after longer and longer
    hub.refusals[f"models/{MODEL}"] = status
    outcome = download(RECIPE)
    assert outcome.code == 1
    expected = "denied access to" if (source, status) == ("modelscope", 401) else words
    assert expected in outcome.err.splitlines()[-2]


def test_the_switch_of_the_sdk(download, hub, source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    outcome = download(f"{MODEL}:vae/diffusion*")
    if source == "modelscope":
        assert outcome.code == 0
    else:
        assert outcome.err == (
            "Requesting the file list from Hugging Face\n"
            "error: HF_HUB_OFFLINE is set, so Hugging Face cannot be accessed\n  hint: unset it, or set DIFFSYNTH_SKIP_DOWNLOAD=1\n"
        )


def test_a_hub_that_falls_silent(download, hub, source, folder, monkeypatch):
    """A connection without data times out, and another one continues."""
    import modelscope_hub._legacy_api

    monkeypatch.setattr(modelscope_hub._legacy_api, "DOWNLOAD_TIMEOUT", 1)
    hub.troubles[SHARDS[0]] = Trouble(after=200_000, times=1, stall=3)
    started = time.monotonic()
    outcome = download(RECIPE)
    assert outcome.code == 0, outcome.err
    assert time.monotonic() - started < 2.9
    assert "the connection was lost" in outcome.err
    assert 100_000 < hub.starts(SHARDS[0])[1] <= 200_000
    assert files_below(folder) == FILES


def test_two_processes_at_once(environment, hub, source, tmp_path, folder):
    """One downloads; the other waits, reports that, and finds all files."""
    hub.troubles[SHARDS[0]] = Trouble(pause=0.05)
    command = ("download", RECIPE, "--source", source)
    both = [start(environment, tmp_path, *command) for _ in range(2)]
    ended = sorted(process.communicate(timeout=60) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert [out.split()[0] for out, _ in ended] == ["All", "Downloaded"]
    assert f"Waiting for another process that is downloading into `{tmp_path}/models`" in ended[0][1]
    assert sorted(path for path, _ in hub.transfers) == sorted(FILES)
    assert files_below(folder) == FILES


def test_bytes_of_what_is_here_are_compared_when_asked_for(download, hub, source, folder):
    """A file of the right size with wrong bytes, also a small one with a git blob id on Hugging Face."""
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
    monkeypatch.setattr("diffsynth_core.hub.download_plan.free_bytes", lambda folder: 1000)
    outcome = download(RECIPE)
    assert outcome.code == 1
    assert outcome.err.endswith(
        f"error: not enough disk space: {TOTAL} to download, 1.0 kB free at `{models}`\n"
        "  hint: free some space, or choose a folder on another disk\n"
    )
    assert hub.transfers == []


def test_a_page_in_the_place_of_a_file_does_not_become_its_beginning(download, hub, folder):
    """A proxy or a captive portal responds with 200 and a page of its own."""
    hub.sent[SHARDS[0]] = b"<html>log in</html>"
    outcome = download(RECIPE)
    message = "the hub sent a file of 19 bytes, but its file list declares 400000"
    assert outcome.code == 1 and message in outcome.err.splitlines()[-2]
    assert len(hub.starts(SHARDS[0])) == 6
    assert files_below(folder).keys() == FILES.keys() - {SHARDS[0]}


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in</html>",
        b"null",
        b'"text"',
        b'{"Data": {"Files": [{"Path": "vae/x"}]}}',
        b'{"Data": {"Files": [{"Path": "vae/x", "Size": -5}]}}',
        b'[{"type": "file", "path": "vae/x"}]',
        b'[{"type": "file", "path": "vae/x", "size": -5, "oid": "1"}]',
    ],
)
def test_an_answer_that_is_no_list(download, hub, source, answer):
    """It ends with one message that names the address, and without a traceback."""
    hub.lists = answer
    outcome = download(RECIPE)
    title, pages, _ = REFUSED[source]
    assert read_problems(outcome.err) == [
        (
            f"cannot get the file list of `{MODEL}` from {title}: unexpected response",
            f"check the connection to {hub.url}/{pages}{MODEL}, or {ANOTHER[source]}",
        )
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HF_TOKEN", "hf_s\u00e9cret", "the Hugging Face token contains invalid characters"),
        (
            "http_proxy",
            "socks5://127.0.0.1:1",
            "a SOCKS proxy is set, but the package that supports it is not installed",
        ),
    ],
)
def test_what_the_client_of_hugging_face_trips_over(environment, tmp_path, name, value, message):
    """In a separate process: the client is created once."""
    settings = environment | {"no_proxy": "", "NO_PROXY": "", name: value}
    running = start(settings, tmp_path, "download", RECIPE, "--source", "huggingface")
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert [problem for problem, _ in read_problems(err)] == [message]
    assert "cret" not in err


def test_log_lines_of_the_sdks_stay_out_of_the_terminal(environment, source, tmp_path):
    """On a closed port: each SDK logs its attempts in its own words."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    process = start(
        environment | {"MODELSCOPE_ENDPOINT": nowhere, "HF_ENDPOINT": nowhere},
        tmp_path, "download", RECIPE, "--source", source,
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    first, *problem = err.splitlines()
    assert first == f"Requesting the file list from {REFUSED[source][0]}"
    assert [line.partition(":")[0] for line in problem] == ["error", "  hint"]
