"""The warm parent, with the real DVC on toy stages: a forked stage is what a started one is, and nothing outlives what it belongs to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.checkout import change, environment, sh
from tests.conftest import ROOT

REPRO = (sys.executable, "-m", "stages.operate.cli", "repro")
TRAITS = """
import ctypes, json, locale, os, random, resource, signal, stat, sys, threading
from pathlib import Path
def main():
    mask = os.umask(0)
    traits = {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "flags": str(sys.flags), "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ),
        "name": __name__, "spec": __spec__.name, "main": sys.modules["__main__"].__spec__.name, "file": __file__, "hash": hash("x"), "umask": mask,
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD, signal.SIGHUP)],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "in DVC's group": os.getpgid(0) == os.getsid(0),
        "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty(), os.fstat(n).st_ino] for n, s in enumerate((sys.stdin, sys.stdout, sys.stderr))],
        "files": sorted("socket" if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{f}").st_mode) else f for f in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{f}")), "threads": threading.active_count(), "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "collector": __import__("gc").isenabled(), "locale": locale.setlocale(locale.LC_CTYPE), "nice": os.nice(0),
        "warm": "json.tool" in sys.modules, "parent": Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\\0")[:-1],
    }
    os.umask(mask)
    Path("out").write_text(json.dumps(traits))
    print("said", flush=True)
"""
STAGE = "\nif __name__ == '__main__':\n    from stages.run import run\n    run(main)\n"
WAIT = """
import pathlib, subprocess, sys, time
def main():
    grandchild = subprocess.Popen(["sleep", "60"])
    pathlib.Path("up").write_text(f"{__import__('os').getpid()} {grandchild.pid}")
    time.sleep(60)
"""


def checkout(folder: Path, modules: str = '"json.tool"', **stages: str) -> Path:
    """A repository with this code and toy stages, one after another; its warm parent imports `modules`."""
    for name in ("conf", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    warm = folder / "stages/operate/warm.py"
    text = warm.read_text(encoding="utf-8")
    begins, ends = text.index("MODULES = ("), text.index('"""What takes a stage long')
    warm.write_text(f"{text[:begins]}MODULES = ({modules},)\n{text[ends:]}", encoding="utf-8")
    pipeline, before = {}, []
    for name, body in stages.items():
        (folder / f"stages/{name}.py").write_text(body + STAGE)
        pipeline[name] = {"cmd": f"python -m stages.{name}", "deps": [f"stages/{name}.py", *before]}
        before = [f"stages/{name}.py"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline}, sort_keys=False))
    for command in (("git", "init", "-q"), ("dvc", "init", "-q"), ("dvc", "config", "core.check_update", "false")):
        sh(folder, *command)
    return folder


def start(folder: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    env = environment(folder, DVC_NO_ANALYTICS="1", **more)
    return subprocess.Popen(
        command, cwd=folder, env=env, start_new_session=True, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def said(process: subprocess.Popen[str]) -> str:
    """What a command printed, once it and all that shares its output have ended."""
    return process.communicate(timeout=120)[0]


def ended(text: str, code: int) -> bool:
    """Whether DVC says that a stage ended so: a signal is negative, or 128 more where the shell that DVC starts (`$SHELL`) stays between the two."""
    return re.search(rf"exited with ({code}|{128 - code})\b", text) is not None if code < 0 else f"exited with {code}\n" in text


def once(condition: Callable[[], Any], what: str) -> Any:
    """Wait until something holds."""
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come about")


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, int], Path]]:
    """A `trunkline repro` whose stage waits: the command, and its processes by role."""
    folder = checkout(tmp_path, one=WAIT)
    process = start(folder, *REPRO)
    child, grandchild = map(int, once(lambda: (folder / "up").exists() and (folder / "up").read_text(), "the stage").split())
    proxy = next(p for p in psutil.Process(process.pid).children(recursive=True) if "stages.one" in p.cmdline())
    pids = {"dvc": process.pid, "server": psutil.Process(child).ppid(), "proxy": proxy.pid, "child": child, "grandchild": grandchild}
    assert len(set(pids.values())) == 5
    yield process, pids, folder
    for pid in pids.values():
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def gone(pids: dict[str, int], but: tuple[str, ...] = ()) -> bool:
    """Whether no process lives any more, but for some."""
    alive = {role for role, pid in pids.items() if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE}
    return alive <= set(but)


def test_a_forked_stage_is_what_a_started_one_is(tmp_path: Path) -> None:
    folder = checkout(tmp_path, zero="def main():\n    import time; time.sleep(0.5)", one=TRAITS)
    seen = []
    for command in (REPRO, ("dvc", "repro", "--force")):
        process = start(folder, *command, PYTHONHASHSEED="0")
        assert "said" in said(process)
        assert process.returncode == 0
        seen.append(json.loads((folder / "out").read_text()))
    warm, cold = seen
    assert (warm.pop("warm"), cold.pop("warm")) == (True, False)
    assert "stages.operate.warm" in warm.pop("parent")
    assert "stages.operate.warm" not in cold.pop("parent")
    for traits in seen:
        for stream in traits["streams"]:
            stream.pop()  # another pipe
        for name in ("PWD", "OLDPWD", "SHLVL", "_"):
            traits["environment"].pop(name, None)
    assert warm.pop("files") == [*cold.pop("files"), "socket"], "what it tells its exit code by; no process that it starts has it"
    assert warm == cold


@pytest.mark.parametrize(("body", "code"), [("import sys; sys.exit(3)", "3"), ("raise KeyError('oops')", "1"), ("import os; os.kill(os.getpid(), 9)", "-9"),
                                            ("import os; os.abort()", "-6"), ("from conf.errors import DataError\n    raise DataError('rows are short', 'add some')", "1")])  # fmt: skip
def test_dvc_hears_how_a_stage_ended(tmp_path: Path, body: str, code: str) -> None:
    folder = checkout(tmp_path, one=f"def main():\n    import os; assert 'warm' in open(f'/proc/{{os.getppid()}}/cmdline').read()\n    {body}")
    process = start(folder, *REPRO)
    text = said(process)
    assert ended(text, int(code)), text
    assert "AssertionError" not in text
    assert ("one stopped rows are short" in text) == ("DataError" in body)
    assert process.returncode != 0


def test_what_is_registered_for_the_end_of_a_process_is_done(tmp_path: Path) -> None:
    ends = """
import atexit, sys, threading, time
def late():
    time.sleep(0.3)
    open("thread", "w").write("done")
def main():
    assert "warm" in open(f"/proc/{__import__('os').getppid()}/cmdline").read()
    atexit.register(lambda: open("atexit", "w").write("done"))
    threading.Thread(target=late).start()
    sys.stdout.write("not flushed")
    sys.exit("in words")
"""
    folder = checkout(tmp_path, one=ends)
    text = said(start(folder, *REPRO))
    assert "not flushed" in text
    assert "in words\n" in text
    assert "exited with 1" in text
    assert (folder / "thread").read_text() == (folder / "atexit").read_text() == "done"


def test_code_that_changed_meanwhile_is_what_runs(tmp_path: Path) -> None:
    edit = "def main():\n    from stages import helper; from pathlib import Path\n    Path('stages/helper.py').write_text('WORD = \"new\" * 2')"
    folder = checkout(tmp_path, one=edit, two="def main():\n    from stages import helper\n    print('helper says', helper.WORD)")
    (folder / "stages/helper.py").write_text("WORD = 'old'")
    text = said(start(folder, *REPRO))
    assert "helper says newnew" in text
    assert "imports for itself" not in text


def test_a_change_of_what_the_parent_itself_has_loaded_makes_stages_start_cold(tmp_path: Path) -> None:
    edit = "def main():\n    from pathlib import Path\n    file = Path('stages/run.py'); file.write_text(file.read_text() + '\\nWORD = 1\\n')"
    folder = checkout(tmp_path, one=edit, two="def main():\n    from stages import run\n    print('run says', run.WORD)")
    text = said(start(folder, *REPRO))
    assert "stages.two imports for itself: code of the warm parent, or installed packages, changed" in text
    assert "run says 1" in text


def test_another_environment_is_no_place_for_this_parent(tmp_path: Path) -> None:
    folder = checkout(tmp_path, one="def main():\n    import os\n    print('threads', os.environ['OMP_NUM_THREADS'], os.environ['DVC_STAGE'])")
    change(folder / "dvc.yaml", "cmd: python", "cmd: OMP_NUM_THREADS=7 python")
    text = said(start(folder, *REPRO))
    assert "stages.one imports for itself: another environment: OMP_NUM_THREADS" in text
    assert "threads 7 one" in text


@pytest.mark.parametrize(
    "thread",
    [
        "threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        "ctypes.CDLL(None).pthread_create(ctypes.byref(ctypes.c_ulong()), None, SLEEP, None)",
    ],
)
def test_no_stage_is_forked_from_a_parent_with_a_thread_that_a_fork_loses(tmp_path: Path, thread: str) -> None:
    """A thread of Python's, and one that only the system knows of."""
    folder = checkout(tmp_path, modules='"spin"', zero="def main():\n    import time; time.sleep(1)", one="def main():\n    print('went on')")
    native = "SLEEP = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)\n"
    (folder / "spin.py").write_text(f"import ctypes, threading, time\n{native}{thread}\n")
    text = said(start(folder, *REPRO))
    assert "stages.one imports for itself: " in text
    assert "thread" in text
    assert "went on" in text


def test_where_no_parent_listens_a_stage_imports_for_itself(tmp_path: Path) -> None:
    folder = checkout(tmp_path, one="def main():\n    import os\n    print('went on', 'TRUNKLINE_WARM' in os.environ)")
    process = start(folder, "dvc", "repro", TRUNKLINE_WARM="nowhere")
    assert "went on False" in said(process)
    assert process.returncode == 0


def test_nothing_is_imported_for_a_repro_with_nothing_to_do(tmp_path: Path) -> None:
    folder = checkout(tmp_path, modules='"spin"', one="def main():\n    pass")
    (folder / "spin.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    said(start(folder, *REPRO))
    (folder / "imported").unlink()
    assert "up to date" in said(start(folder, *REPRO))
    assert not (folder / "imported").exists()
    assert (folder / ".dvc/tmp/trunkline/warm").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("victim", "survivors"), [("proxy", ()), ("server", ("grandchild",)), ("dvc", ()), ("child", ("grandchild",))])
def test_a_killed_process_takes_along_what_belongs_to_it(
    waiting: tuple[subprocess.Popen[str], dict[str, int], Path], victim: str, survivors: tuple[str, ...]
) -> None:
    """Where the warm parent or the child itself is killed, what the child started is left, as where DVC started it."""
    process, pids, _ = waiting
    os.kill(pids[victim], signal.SIGKILL)
    once(lambda: gone(pids, survivors), "the end of all")
    if victim != "dvc" and "grandchild" not in survivors:
        assert "Traceback" not in said(process)
    assert process.wait(20) != 0


def test_a_killed_group_leaves_nothing(waiting: tuple[subprocess.Popen[str], dict[str, int], Path]) -> None:
    process, pids, _ = waiting
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)
    once(lambda: gone(pids), "the end of all")


@pytest.mark.parametrize("whom", ["group", "proxy"])
def test_an_interruption_is_told_once(waiting: tuple[subprocess.Popen[str], dict[str, int], Path], whom: str) -> None:
    process, pids, _ = waiting
    os.killpg(process.pid, signal.SIGINT) if whom == "group" else os.kill(pids["proxy"], signal.SIGINT)
    os.kill(pids["grandchild"], signal.SIGKILL)
    text = said(process)
    assert text.count("one interrupted; nothing half-written was kept.") == 1, text
    assert "Traceback" not in text
    assert "exited with 130" in text or whom == "group"
    once(lambda: gone(pids), "the end of all")


def test_a_terminated_stage_takes_its_child_along(waiting: tuple[subprocess.Popen[str], dict[str, int], Path]) -> None:
    process, pids, _ = waiting
    os.kill(pids["proxy"], signal.SIGTERM)
    assert ended(said(process), -signal.SIGTERM)
    once(lambda: gone(pids), "the end of all")


def test_the_next_repro_waits_until_the_parent_of_a_killed_one_is_gone(waiting: tuple[subprocess.Popen[str], dict[str, int], Path]) -> None:
    process, pids, folder = waiting
    os.kill(pids["server"], signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder / "stages/one.py").write_text("def main():\n    print('went on')" + STAGE)
    second = start(folder, *REPRO)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"waiting for process {process.pid}")
    os.kill(pids["server"], signal.SIGCONT)
    assert "went on" in said(second)
    once(lambda: gone(pids), "the end of all")


def test_the_libraries_that_the_parent_imports_lose_no_thread_in_a_fork() -> None:
    """Under this environment's own thread counts; what they would leave in the parent after a fork is named."""
    code = """
import importlib, os, threading
from stages.operate import warm
for name in warm.MODULES:
    importlib.import_module(name)
if os.fork() == 0:
    os._exit(0)
os.wait()
print(threading.active_count(), warm.native_threads())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "1 []"
