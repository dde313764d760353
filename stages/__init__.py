"""The pipeline: one module per batch stage, run as `python -m stages.<name>`; `serve/` the service, `operate/` the verbs.

Under `trunkline repro` a stage has a warm parent (`stages.operate.warm`), named by TRUNKLINE_WARM. Its process then hands over all that
makes it up, streams included, and stands for the child that does the work: it passes an interruption on, and ends as the child does.
"""

from __future__ import annotations

import os
import sys
from types import FrameType, TracebackType

PATIENCE = 3.0
"""Seconds that a stage waits for a warm parent that is importing, before it imports for itself."""


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell an interruption in a sentence, and all else with its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted before it began; `dvc repro` goes on from here.\n")
    else:
        sys.__excepthook__(kind, error, trace)


def hand_over(address: str) -> None:
    """Let the warm parent at a Unix socket run this process's command, and end as that ends; returns where there is none, or not for this one."""
    import json
    import signal
    import socket
    from pathlib import Path

    with socket.socket(socket.AF_UNIX) as parent:
        try:
            parent.settimeout(PATIENCE)
            parent.connect(address)
            if not parent.recv(1):  # it says that it is free; until then nothing has begun
                return
        except OSError:  # none, or busy
            return
        parent.settimeout(None)

        def interrupt(number: int, frame: FrameType | None) -> None:
            parent.send(b"i")

        before = signal.signal(signal.SIGINT, interrupt)
        request = {"command": sys.orig_argv, "folder": str(Path.cwd()), "environment": dict(os.environ), "interruptible": before == signal.default_int_handler}
        socket.send_fds(parent, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        said = parent.makefile("r").readline().strip()
        if said == "cold":
            signal.signal(signal.SIGINT, before)
            return
    code = int(said or -signal.SIGKILL)  # nothing: it was killed, and the child with it
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if sys.argv[0] == "-m":  # a stage as a process: Ctrl-C while it still imports, which `stages.run` cannot see
    sys.excepthook = tell
    if (warm := os.environ.pop("TRUNKLINE_WARM", None)) and sys.orig_argv[1] == "-m":  # without options for the interpreter
        hand_over(warm)
