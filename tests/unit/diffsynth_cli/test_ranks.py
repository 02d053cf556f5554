"""The message of a process that ends because another one has ended."""

import os
import subprocess
import sys

import pytest

from diffsynth_cli import REPORTS

PEER = "import sys; sys.stdin.read()"
"""Lives until it is released."""
LAUNCHER = f"""
import os, subprocess, sys

def start(rank, code, **streams):
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {{"RANK": rank}}, **streams)

peer = start("1", {PEER!r}, stdin=subprocess.PIPE)
rank = start("0", sys.argv[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
assert rank.stdout.readline() == "begun\\n"
peer.stdin.close()
peer.wait()
rank.stdin.close()
sys.exit(rank.wait())
"""
RANK = """
import sys, threading
from diffsynth_cli import ranks

noticed, lost = threading.Event(), ranks._Peers._lost

def noticing(peers):
    found = lost(peers)
    if peers._known:
        noticed.set()
    return found

ranks._Peers._lost = noticing
with ranks.in_company():
    assert noticed.wait(60)
    print("begun", flush=True)
    sys.stdin.read()
    {statement}
"""


@pytest.mark.parametrize(
    ("statement", "reported"),
    [
        ("raise TypeError('of our own')", "TypeError: of our own"),
        ("raise RuntimeError('Connection closed by peer')", "PeerLost: process 2 of 2 has died"),
        ("raise ConnectionResetError('reset')", "PeerLost: process 2 of 2 has died"),
    ],
)
def test_only_what_a_collective_raises_is_laid_to_a_peer(tmp_path, statement, reported):
    environment = os.environ | {REPORTS: str(tmp_path), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    outcome = subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK.format(statement=statement)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.stderr.splitlines()[-1].endswith(reported)
