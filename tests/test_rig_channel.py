# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rig's command channel: framing, and the real agent served over a socket pair on this host."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration import agent
from integration.agent import Decoder, FrameError, Message, encode
from integration.dom0 import ChannelDead, CommandFailed, CommandTimeout, Dom0, Dom0Error

messages = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text())


@given(
    frames=st.lists(st.tuples(messages, st.binary(max_size=2000)), max_size=6),
    cuts=st.lists(st.integers(min_value=1, max_value=300), min_size=1),
)
def test_frames_survive_any_cut(frames: list[tuple[Message, bytes]], cuts: list[int]) -> None:
    stream = b"".join(encode(message, blob) for message, blob in frames)
    came: list[tuple[Message, bytes]] = []
    decoder, turn = Decoder(), 0
    while stream:
        size = cuts[turn % len(cuts)]
        came += decoder.feed(stream[:size])
        stream, turn = stream[size:], turn + 1
    assert came == frames


@pytest.mark.parametrize(
    "junk",
    [
        b"login: root\r\n.......",
        b"xRIG\xff\xff\xff\xff\0\0\0\0",
        b"xRIG\0\0\0\0\x7f\0\0\0",
        b"xRIG\0\0\0\x02\0\0\0\0{]",
        b"xRIG\0\0\0\x02\0\0\0\0[]",
        b"xRIG\0\0\0\x02\0\0\0\0\xff\xff",
    ],
)
def test_what_is_no_frame_is_refused(junk: bytes) -> None:
    decoder = Decoder()
    with pytest.raises(FrameError):
        list(decoder.feed(junk))


def test_a_frame_that_nobody_would_accept_is_not_sent() -> None:
    with pytest.raises(FrameError, match="too long"):
        encode({}, bytes(agent.MAX_PART_BYTES + 1))


AGENT = """
import os, sys
from integration.agent import Agent
# A virtio port whose other side is gone gives no end of file; a socket does, and tests must end.
class Ending(Agent): pass
read = os.read
def read_or_end(fd, size):
    data = read(fd, size)
    if not data and fd == int(sys.argv[1]):
        os._exit(0)
    return data
os.read = read_or_end
Agent(int(sys.argv[1])).serve()
"""


class Rig:
    """The real agent in a process of its own, and the client connected to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                cwd=Path(agent.__file__).parent.parent,
            )
        self.dom0 = Dom0(ours, lambda: "(here the console's end is said)")
        self.dom0.wait_ready(30)

    def end(self) -> None:
        self.dom0.close()
        self.process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def shared() -> Iterator[Dom0]:
    rig = Rig()
    yield rig.dom0
    rig.end()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.end()


def test_a_command_and_its_outcome(shared: Dom0) -> None:
    done = shared.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.status, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert done.text == "out"
    assert done.seconds >= 0


def test_a_string_is_for_the_shell_and_a_list_is_not(shared: Dom0) -> None:
    assert shared.run("echo $((1 + 1))").text == "2"
    assert shared.run(["echo", "$((1 + 1))"]).text == "$((1 + 1))"


def test_environment_and_folder(shared: Dom0) -> None:
    assert shared.run("echo $GREETING; pwd", env={"GREETING": "hi"}, cwd="/").text == "hi\n/"


def test_a_failure_says_everything(shared: Dom0) -> None:
    with pytest.raises(CommandFailed, match=r"(?s)exit 4.*status 4.*good.*bad") as caught:
        shared.run("echo good; echo bad >&2; exit 4")
    assert caught.value.completed.status == 4


def test_a_command_that_is_not_there(shared: Dom0) -> None:
    with pytest.raises(Dom0Error, match=r"no/such/program"):
        shared.run(["/no/such/program"])


def test_standard_input_of_any_size(shared: Dom0) -> None:
    data = os.urandom(1_500_000)
    assert shared.run("cat", stdin=data).stdout == data
    assert shared.run("cat").stdout == b""


def test_input_that_nobody_reads_is_no_error(shared: Dom0) -> None:
    assert shared.run("exec true", stdin=bytes(1_000_000)).status == 0


def test_a_timeout_kills_the_whole_process_group(shared: Dom0) -> None:
    began = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        shared.run("sleep 77 & echo $!; sleep 78", timeout_s=0.5, check=False)
    assert time.monotonic() - began < 10
    child = int(caught.value.completed.text)
    for _ in range(100):  # killed at once; reaped by whoever is process 1
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] in "ZX":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_a_daemon_left_behind_holds_nobody_up(shared: Dom0) -> None:
    began = time.monotonic()
    done = shared.run("sleep 5 & echo $!")
    assert time.monotonic() - began < 4
    os.kill(int(done.text), signal.SIGKILL)


def test_many_at_the_same_time(shared: Dom0) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda i: shared.run(f"sleep 0.5; echo {i}").text, range(12)))
    assert texts == [str(i) for i in range(12)]
    assert time.monotonic() - began < 5


def test_files_there_and_back(shared: Dom0, tmp_path: Path) -> None:
    data = os.urandom(3 * agent.CHUNK_BYTES + 17)
    path = tmp_path / "new/folder/file"
    shared.put(path, data, mode=0o750)
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o750
    assert shared.get(path) == data
    shared.put(path, "")
    assert shared.get(path) == b""
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_files_that_cannot_be(shared: Dom0, tmp_path: Path) -> None:
    with pytest.raises(Dom0Error, match="no-such-file"):
        shared.get(tmp_path / "no-such-file")
    (tmp_path / "file").touch()
    with pytest.raises(Dom0Error, match="file/below"):
        shared.put(tmp_path / "file/below", "x" * (3 * agent.CHUNK_BYTES))
    assert shared.run("echo alive").text == "alive"


def test_output_comes_while_the_command_runs(shared: Dom0) -> None:
    came = threading.Event()
    pieces: list[tuple[int, bytes]] = []

    def on_output(stream: int, data: bytes) -> None:
        pieces.append((stream, data))
        came.set()

    running = shared.spawn("echo started; read x; echo got $x >&2", stdin=True, on_output=on_output)
    assert came.wait(10)
    assert running.stdout == b"started\n"
    with pytest.raises(TimeoutError):
        running.wait(0.05)
    running.write(b"it\n")
    assert running.wait(10, check=True).stderr == b"got it\n"
    assert pieces == [(1, b"started\n"), (2, b"got it\n")]
    assert running.wait(0) == running.wait(0)


def test_a_callback_that_fails_harms_nobody_else(shared: Dom0) -> None:
    def fail(stream: int, data: bytes) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shared.run("echo x", on_output=fail)
    assert shared.run("echo y").text == "y"


def test_killing(shared: Dom0) -> None:
    running = shared.spawn("trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    while running.stdout != b"ready\n":
        time.sleep(0.01)
    running.kill(signal.SIGTERM)
    done = running.wait(10)
    assert (done.status, done.stdout) == (5, b"ready\nbye\n")
    running.kill(signal.SIGTERM)  # too late, and no error


def test_a_terminal(shared: Dom0) -> None:
    running = shared.spawn("test -t 0 && test -t 1 && read x && stty size && echo $x", pty=True)
    running.resize(33, 99)
    running.write(b"hello\n")
    assert running.wait(10, check=True).stdout.split() == [b"hello", b"33", b"99", b"hello"]


def test_a_dead_channel_is_said_with_the_consoles_end(rig: Rig) -> None:
    running = rig.dom0.spawn("sleep 60")
    threading.Timer(0.2, rig.process.kill).start()
    with pytest.raises(ChannelDead, match="console's end"):
        running.wait(20)
    with pytest.raises(ChannelDead):
        running.wait(20)
    with pytest.raises(ChannelDead):
        rig.dom0.run("true")
    with pytest.raises(ChannelDead):
        rig.dom0.get("/etc/passwd")


def test_junk_on_the_wire_is_a_dead_channel() -> None:
    ours, theirs = socket.socketpair()
    dom0 = Dom0(ours, lambda: "(the console)")
    with theirs:
        theirs.sendall(b"Kernel panic - not syncing: who wrote this here?")
        with pytest.raises(ChannelDead, match="Kernel panic"):
            dom0.wait_ready(10)
    dom0.close()


def test_an_agent_that_never_says_hello() -> None:
    ours, theirs = socket.socketpair()
    dom0 = Dom0(ours, lambda: "(the console)")
    with theirs, pytest.raises(ChannelDead, match=r"(?s)did not answer.*the console"):
        dom0.wait_ready(0.1)
    dom0.close()


def test_an_agent_that_was_started_anew_fails_what_was_running() -> None:
    ours, theirs = socket.socketpair()
    dom0 = Dom0(ours, lambda: "")
    with theirs:
        theirs.sendall(encode({"hello": 1}))
        dom0.wait_ready(10)
        running = dom0.spawn("sleep 60")
        theirs.sendall(encode({"hello": 2}))
        with pytest.raises(ChannelDead, match="anew"):
            running.wait(10)
    dom0.close()
