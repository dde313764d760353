"""What a stage's process hands over to its warm parent, and how the parent's child becomes that process.

The child takes the streams, folder, arguments, signals and DVC's environment variables of the process that it stands for. It forgets the
modules of this repository, so that it reads the code as it is, and keeps the libraries. It ends as a child of multiprocessing does: what is
registered for the end runs, threads are joined, streams flushed; what Python does after that, taking apart every module, would take 0.4 s.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

OURS = ("conf", "stages")
DVCS = {"DVC_STAGE", "DVC_ROOT", "PWD", "OLDPWD", "SHLVL", "_", "PS1", "PS2", "PYTHONHASHSEED"}
"""Environment variables that DVC, its shell or `stages.run` sets for a stage: no library reads them as it is imported."""
NAME = 15
"""Linux's PR_SET_NAME."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What makes up a process: what a child becomes."""

    command: list[str]
    """`python -m <module> <arguments>`."""
    folder: str
    environment: dict[str, str]
    interruptible: bool
    """Whether an interruption is for it, and not ignored as in a background job of a shell without job control."""
    streams: tuple[int, ...]
    connection: socket.socket | None = None
    """To the process that it stands for, in the child: it tells its exit code itself, because the parent may be importing."""

    @property
    def module(self) -> str:
        """What runs."""
        return self.command[2]


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a library may read as it is imported."""
    return {name: value for name, value in environment.items() if name not in DVCS}


def receive(connection: socket.socket) -> Request | None:
    """What a stage hands over; None: it went away."""
    text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while text and not text.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            text = b""
        text += more
    return Request(**json.loads(text), streams=tuple(streams)) if text else None


def become(request: Request) -> NoReturn:
    """Turn this child into `python -m <command>`, which ends as that does."""
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    for name in DVCS:
        if name in request.environment:
            os.environ[name] = request.environment[name]
        else:
            os.environ.pop(name, None)
    os.environ["PYTHONHASHSEED"] = "0"  # as `stages.run` would start it anew
    os.chdir(request.folder)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.orig_argv, sys.argv = request.command, ["-m", *request.command[3:]]
    ctypes.CDLL(None).prctl(NAME, request.module.encode())
    gc.enable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler if request.interruptible else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if request.connection:
        os.register_at_fork(after_in_child=request.connection.close)  # or a worker that outlives it would keep the other end waiting
    code = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = exit_code(ended)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    end(code, request.connection)


def exit_code(ended: SystemExit) -> int:
    """The code that Python exits with; anything but a number is printed."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    sys.stderr.write(f"{ended.code}\n")
    return 1


def end(code: int, connection: socket.socket | None) -> NoReturn:
    """End this process, by a signal where the code is negative; the last thing it does is to say so."""
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does: there is no public way to join all threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if connection and code >= 0:
        with suppress(OSError):
            connection.sendall(b"%d\n" % (code & 0xFF))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)
