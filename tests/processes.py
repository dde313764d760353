"""Stages as real processes, cheaply: a server of one thread imports the heavy libraries once and forks a child for every run.

The child is what `python -m <module>` is: the module runs as `__main__` in the folder, with its own stdout and stderr, and ends by
its own exit code.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXED = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GX_ANALYTICS_ENABLED": "false",
         "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "NO_PROXY": "*", "BENTOML_DO_NOT_TRACK": "1"}  # fmt: skip
OURS = ("conf", "stages", "tests")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that has ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    said: str
    """What it wrote to stderr."""
    error: str
    """Class of the error that `stages.run` told; empty: none."""
    growth: int
    """Bytes by which its memory grew at most."""
    seconds: float
    """How long it ran."""


def run(module: str, folder: Path, needs: Sequence[str] = (), env: Mapping[str, str] | None = None, limit: float = 60.0) -> Ended:
    """Run `python -m <module>` in a folder.

    Args:
        needs: what the server imports before it forks; kept for later runs.
        env: variables of this process alone.
        limit: seconds after which it is killed: it hangs.
    """
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps({"module": module, "folder": str(folder), "needs": list(needs), "env": dict(env or {}), "limit": limit}) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    assert line, "the server of processes died"
    return Ended(**json.loads(line))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The server of this test session."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRUNKLINE_MIRROR") and not key.lower().endswith("_proxy")} | FIXED
    server = subprocess.Popen([sys.executable, "-m", "tests.processes"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def serve() -> None:
    """Answer one request per line of stdin, until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        for name in request["needs"]:
            __import__(name)
        threads = {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")} - {"python", "jemalloc_bg_thd"}  # jemalloc's knows of forks
        assert not threads, f"{request['needs']} start {threads}, and a fork would lose them"
        with tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as error:
            before, started = _resident(), time.monotonic()
            child = os.fork()
            if child == 0:
                _become(request["module"], request["folder"], request["env"], stderr.fileno(), error.fileno())
            code, peak = _wait(child, started + request["limit"])
            stderr.seek(0)
            error.seek(0)
            ended = Ended(code=code, said=stderr.read().decode(errors="replace"), error=error.read().decode(), growth=peak - before,
                          seconds=round(time.monotonic() - started, 2))  # fmt: skip
        sys.stdout.write(json.dumps(vars(ended)) + "\n")
        sys.stdout.flush()


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _wait(child: int, deadline: float) -> tuple[int, int]:
    """Exit code and peak memory; kills it at the deadline."""
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _become(module: str, folder: str, env: Mapping[str, str], stderr: int, error: int) -> None:
    """Turn this child into `python -m <module>`, and never return."""
    import runpy

    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (stderr, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        os.environ.update(env)
        os.chdir(folder)
        sys.orig_argv, sys.argv = [sys.executable, "-m", module], [module]
        own = (Path(folder) / module / "__main__.py").is_file()  # `python -m conf` is that of the folder
        sys.path[0] = folder if own else str(ROOT)
        for name in [name for name in sys.modules if name == module or (own and name.split(".")[0] in OURS)]:
            del sys.modules[name]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if ended.__context__ is not None:  # what stages.run was handling when it left
            os.write(error, type(ended.__context__).__name__.encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
