"""A warm parent for the stages of one `trunkline repro`: it imports the heavy libraries once, and forks a child for every stage.

Twelve processes that import torch, transformers and Great Expectations anew spend a third of a warm `tiny` on it. `trunkline repro`
starts this process beside DVC. It imports nothing before the first stage asks, so that a `dvc repro` with nothing to do costs nothing,
and then imports on a core of its own while the first stages work. No module of this repository stays loaded in a child: each reads the
code as it is. A stage that this process cannot stand for, or that finds none, imports for itself, as under a plain `dvc repro`.

What a forked stage must not notice, and why it does not:
- no thread is lost: none of Python's runs here, and a fork after which a native one is left in this process is taken back. OpenBLAS
  stops its threads before a fork and starts as many after it, jemalloc's background thread knows of forks, OpenMP starts its at first use
- libraries read the environment as they are imported: a stage whose environment is another one (DVC's own names aside) is refused,
  and so is one whose standard error is a terminal where ours was none, or after packages were installed
- CUDA cannot be used after a fork: where there is a GPU, no warm parent is started

Who dies with whom: this process with DVC, a child with this process, a child and what it started with the process that DVC waits
for. All are in DVC's process group. The lock of `trunkline repro` is held until this process is gone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import psutil

from stages.files import remove
from stages.operate.child import OURS, Request, become, receive, relevant
from stages.run import WORK, settle

ADDRESS = WORK / "warm" / "socket"
MODULES = (
    *("pydantic.dataclasses", "rich.logging", "numpy", "pandas", "datatrove.executor.local"),
    *("sqlalchemy.orm", "pyparsing", "altair", "scipy.stats", "boto3", "great_expectations"),
    *("torch", "sympy", "torch.distributed.tensor", "torch._dynamo", "peft", "transformers.trainer", "transformers.models.llama.modeling_llama"),
    *("trl.trainer.sft_trainer", "lm_eval.evaluator", "ctranslate2", "sklearn.linear_model", "dvclive", "dvc.repo", "phonenumbers", "ftfy"),
)
"""What takes a stage long to import, in the order of need; the large libraries in parts, because a stage that asks meanwhile waits for one."""
GPUS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
QUIET = {"jemalloc_bg_thd"}
"""Native threads that may be there after a fork."""
GROUP_WIDE = 0.02
"""Seconds within which an interruption of the whole process group has reached all in it."""
PARENT_DIES = 1
"""Linux's PR_SET_PDEATHSIG."""


def start(lock: int) -> str | None:
    """Start a warm parent beside this process, which becomes DVC; returns its address for TRUNKLINE_WARM, or None where there can be none.

    Args:
        lock: descriptor of a lock that it holds as long as it lives.
    """
    if sys.platform != "linux" or any(gpu.exists() for gpu in GPUS):
        return None
    ADDRESS.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    ADDRESS.parent.chmod(0o700)  # who may connect may run code as this user
    remove(ADDRESS)
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(ADDRESS))
        except OSError:  # a file system without sockets
            return None
        listener.listen()
        command = [sys.executable, "-m", "stages.operate.warm", *map(str, (listener.fileno(), lock, os.getpid()))]
        subprocess.Popen(command, pass_fds=(listener.fileno(), lock), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return str(ADDRESS)


@dataclass
class Stage:
    """A process that DVC waits for, and the child that does its work."""

    connection: socket.socket
    child: int
    ended: int
    """Descriptor that can be read once the child has ended."""
    forked: float = field(default_factory=time.monotonic)


class Server:
    """Answers the stages, one event after another, in one thread."""

    def __init__(self, listener: socket.socket, lock: int) -> None:
        self.listener, self.lock, self.selector, self.stages = listener, lock, selectors.DefaultSelector(), list[Stage]()
        self.interrupted = 0.0
        self.environment, self.terminal = relevant(os.environ), os.isatty(2)
        settle()
        self.seen = changeable()
        self.selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> Request:
        """Answer until DVC's end ends this process; returns in each child, with what it is to become."""
        modules: Iterator[str] | None = None
        while True:
            name = next(modules, None) if modules else None
            if name is not None:
                with suppress(ImportError):  # not installed here: who needs it will say so
                    importlib.import_module(name)
            for key, _ in self.selector.select(0 if name else None):
                if key.data is not None:
                    self.attend(key.data)
                elif request := self.accept():
                    return request
                else:
                    modules = modules or iter(MODULES)

    def accept(self) -> Request | None:
        """Fork for a stage, or tell it to import for itself; returns what to become in the child, and None here."""
        connection, _ = self.listener.accept()
        try:
            connection.sendall(b"?")
            request = receive(connection)
        except OSError:  # it is gone
            request = None
        if request is None:
            connection.close()
        elif reason := self.refusal(request):
            refuse(connection, request, reason)
        else:
            return self.fork(connection, request)
        return None

    def refusal(self, request: Request) -> str:
        """Why a stage has to import for itself; empty: it has not."""
        theirs = relevant(request.environment)
        if different := [name for name in theirs.keys() | self.environment.keys() if theirs.get(name) != self.environment.get(name)]:
            return f"another environment: {', '.join(sorted(different))}"
        if os.isatty(request.streams[2]) != self.terminal:
            return "another standard error"
        if changeable() != self.seen:
            return "code of the warm parent, or installed packages, changed"
        if threading.active_count() > 1:
            return f"threads: {threading.enumerate()}"
        return ""

    def fork(self, connection: socket.socket, request: Request) -> Request | None:
        """Fork; the child waits until this process has seen that no thread was lost."""
        go, sign = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        gc.freeze()  # the collector would write into every shared page
        parent, child = os.getpid(), os.fork()
        if child == 0:
            os.close(sign)
            ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)
            if os.getppid() != parent or not os.read(go, 1):
                os._exit(1)
            os.close(go)
            self.let_go()
            return replace(request, connection=connection)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        os.close(go)
        if lost := native_threads():
            os.close(sign)
            os.waitpid(child, 0)
            refuse(connection, request, f"a fork would lose the threads {lost}")
            return None
        stage = Stage(connection=connection, child=child, ended=os.pidfd_open(child))
        self.stages.append(stage)
        for event in (connection, stage.ended):
            self.selector.register(event, selectors.EVENT_READ, stage)
        os.write(sign, b"!")
        os.close(sign)
        for stream in request.streams:
            os.close(stream)
        return None

    def let_go(self) -> None:
        """Close in a child what is this process's."""
        self.selector.close()
        self.listener.close()
        os.close(self.lock)
        for stage in self.stages:
            stage.connection.close()
            os.close(stage.ended)

    def attend(self, stage: Stage) -> None:
        """Hear of a stage: its child has ended, or the process that DVC waits for was interrupted, or is gone."""
        if stage not in self.stages:  # two things at once
            return
        ended, status = os.waitpid(stage.child, os.WNOHANG)
        if ended:
            with suppress(OSError):
                stage.connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            for event in (stage.connection, stage.ended):
                self.selector.unregister(event)
            stage.connection.close()
            os.close(stage.ended)
            self.stages.remove(stage)
            return
        try:
            heard = stage.connection.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        if heard:
            time.sleep(GROUP_WIDE)
            if self.interrupted < stage.forked:  # this process was not: it was for that one alone
                os.kill(stage.child, signal.SIGINT)
        else:
            kill_tree(stage.child)

    def note(self, number: int, frame: FrameType | None) -> None:
        """An interruption of the process group, which reaches the children too."""
        self.interrupted = time.monotonic()

    def end(self, number: int, frame: FrameType | None) -> None:
        """DVC has ended, or all are to."""
        for stage in self.stages:
            kill_tree(stage.child)
        os._exit(0)


def changeable() -> list[tuple[str, int]]:
    """When what this process has loaded of the repository last changed, and what is installed."""
    ours = [module.__file__ for name, module in sorted(sys.modules.items()) if name.split(".")[0] in (*OURS, "__main__")]
    return [(path, Path(path).stat().st_mtime_ns) for path in (*filter(None, ours), sysconfig.get_path("purelib"))]


def native_threads() -> list[str]:
    """Names of this process's threads, without the main one and those that know of forks."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return [name for name in names if name not in QUIET]


def refuse(connection: socket.socket, request: Request, reason: str) -> None:
    """Tell a stage to import for itself, and the user why."""
    sys.stderr.write(f"{request.module} imports for itself: {reason}\n")
    for stream in request.streams:
        os.close(stream)
    with suppress(OSError):
        connection.sendall(b"cold\n")
    connection.close()


def kill_tree(child: int) -> None:
    """Kill a child and all that it started."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(child)
        for process in [*top.children(recursive=True), top]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def main(listener: int, lock: int, dvc: int) -> None:
    """Serve the stages of a DVC until it ends."""
    server = Server(socket.socket(fileno=listener), lock)
    signal.signal(signal.SIGINT, server.note)
    signal.signal(signal.SIGTERM, server.end)
    ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)
    if os.getppid() == dvc:
        gc.disable()
        become(server.serve())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
