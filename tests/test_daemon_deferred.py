# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon does not carry what it does not use; what is used after all is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent

NOT_RUN = "asyncio.events", "_ssl", "_hashlib", "idna.core", "_bz2", "_lzma"
"""What the deferred modules import first when they are run."""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=PROJECT, timeout=60, check=False,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_daemon_runs_none_of_them() -> None:
    program = "import sys, xshmd.daemon.__main__; print(*sys.modules)"
    loaded = set(run(program).split())
    assert {"trio", "structlog", "asyncio", "ssl"} <= loaded
    assert not loaded & set(NOT_RUN)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("import asyncio; print(asyncio.run(asyncio.sleep(0, 'slept')))", "slept"),
        ("from asyncio import run; print(run.__name__)", "run"),
        ("import asyncio.events; print(asyncio.events.__name__)", "asyncio.events"),
        ("from asyncio.queues import Queue; print(Queue.__name__)", "Queue"),
        ("import ssl; print(type(ssl.create_default_context()).__name__)", "SSLContext"),
        ("import lzma; print(lzma.decompress(lzma.compress(b'a')))", "b'a'"),
        ("from difflib import get_close_matches as g; print(g('siez', ['size']))", "['size']"),
        ("import hashlib; print(hashlib.sha256(b'').hexdigest()[:4])", "e3b0"),
        ("import secrets; print(len(secrets.token_bytes(3)))", "3"),
        ("import hmac; print(hmac.compare_digest(b'a', b'a'))", "True"),
        ("import idna; print(idna.encode('k\\u00f6ln'))", "b'xn--kln-sna'"),
        ("import uuid; print(uuid.uuid5(uuid.NAMESPACE_DNS, 'x').version)", "5"),
        ("import ssl; print(hasattr(ssl, 'nonsense'), hasattr(ssl, 'nonsense'))", "False False"),
        ("import asyncio as a; print(getattr(a, 'nonsense', 7), a.Queue.__name__)", "7 Queue"),
    ],
)
def test_one_that_is_used_is_whole(use: str, said: str) -> None:
    assert run(f"import xshmd.daemon.__main__\n{use}").strip() == said


def test_one_that_is_there_already_stays() -> None:
    program = "import ssl; was = ssl.SSLContext; import xshmd.daemon\nimport ssl as now; "
    assert run(program + "print(now is ssl, now.SSLContext is was)").strip() == "True True"


def test_several_threads_may_be_the_first() -> None:
    program = """
import threading, xshmd.daemon
import asyncio
found, start = [], threading.Barrier(8)
def use():
    start.wait()
    found.append(asyncio.run)
threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(found)))
"""
    assert run(program).strip() == "8 1"
