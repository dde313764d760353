"""Killed, out of disk, interrupted, tampered with: `dvc repro` then ends where an undisturbed run does.

A cut-down `tiny` (fewer steps and rows, changed in the test's own checkout) is run undisturbed once, for its lock and for how long each
stage takes. The moments of the kills are drawn from TRUNKLINE_SEED, which is printed.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from tests.checkout import EVERYTHING, change, commit, cut_down_tiny, ran, sh, working_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 5
"""Of each stage."""
DISK_BYTES = 200 << 20
REPRO = (sys.executable, "-m", "stages.operate.cli", "repro")
"""What `make` runs: `dvc repro`, once what a killed DVC left half-written is gone."""
DONE = "Use `dvc push`"
"""DVC's last word: what comes after it, as Python ends, interrupts no work any more, and nobody is left to tell it."""
BAR = re.compile(r"Exception ignored in: <function tqdm\.__del__.*?^AttributeError: 'Tqdm'[^\n]*\n", re.DOTALL | re.MULTILINE)
"""What DVC's progress bar says when Ctrl-C comes while it is being made, beside DVC's own sentence."""
RESUMED = "going on from checkpoint-"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A checkout that ran undisturbed."""

    folder: Path
    lock: bytes
    seconds: dict[str, float] = field(default_factory=dict)
    """Of `dvc repro` of each stage, start-up and commit included."""


def small_tiny(folder: Path) -> Path:
    """A repository with the cut-down `tiny`, committed, nothing run."""
    working_tree(folder, "tiny")
    cut_down_tiny(folder, checkpoint_every=2)
    commit(folder, "Use a small tiny")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = small_tiny(tmp_path_factory.mktemp("undisturbed") / "trunkline")
    seconds = {}
    for stage in EVERYTHING:
        started = time.monotonic()
        assert ran(sh(folder, "dvc", "repro", stage)) == [stage]
        seconds[stage] = time.monotonic() - started
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "commit", "-qm", "Run it")
    return Reference(folder=folder, lock=(folder / "dvc.lock").read_bytes(), seconds=seconds)


@pytest.fixture(scope="module")
def spare(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the undisturbed checkout, with a cache of its own, for what each test puts right again."""
    return Path(shutil.copytree(reference.folder, tmp_path_factory.mktemp("spare") / "trunkline", symlinks=True))


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), **environment}
    return subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def stage_processes(dvc: int) -> list[psutil.Process]:
    """What runs a stage of `dvc repro`: the process that DVC waits for, and under `trunkline repro` its child and their warm parent."""
    found: dict[bool, list[psutil.Process]] = {True: [], False: []}
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(dvc).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                line = child.cmdline()
                if "-m" in line and (module := line[line.index("-m") + 1]).startswith(("stages.", "conf")):
                    found[module == "stages.operate.warm"].append(child)
    return found[False] + found[True] if found[False] else []


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that still work in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
    return found


def locked_stages(folder: Path) -> list[str]:
    """The stages in dvc.lock, in its order; none where it is missing or no YAML."""
    try:
        return list((yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8")) or {}).get("stages", {}))
    except (FileNotFoundError, yaml.YAMLError):
        return []


def recover(folder: Path, stage: str) -> str:
    """Bring back what came before, where the kill of DVC cut dvc.lock short; returns what was needed."""
    before = EVERYTHING[: EVERYTHING.index(stage)]
    if locked_stages(folder)[: len(before)] == before:
        return "nothing"
    for earlier in before:  # one by one: for a target alone DVC takes another order, which dvc.lock would keep
        assert set(ran(sh(folder, *REPRO, "--single-item", earlier))) <= {"compose"}, "what had been done came from the cache"
    return "trunkline repro"


def kill_during(folder: Path, stage: str, seconds: float, draw: random.Random) -> Counter[str]:
    """Run a stage by `trunkline repro` and kill it KILLS times, in turn with DVC and alone (one of what runs it); then let it finish.

    Counts who was killed and what was seen.
    """
    seen: Counter[str] = Counter()
    while seen["group"] + seen["stage"] < KILLS:
        alone, after = (seen["group"] + seen["stage"]) % 2 == 1, draw.uniform(0.0, seconds)
        process = start(folder, *REPRO, "--force", "--single-item", stage)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            victims = stage_processes(process.pid) if alone else []
            if not victims:  # or there is none: DVC starts up, or commits
                os.killpg(process.pid, signal.SIGKILL)
            else:
                with suppress(psutil.NoSuchProcess):
                    draw.choice(victims).kill()
            whom = "stage" if victims else "group"
            said = process.communicate()[0]
            assert "Traceback" not in said
            needed = recover(folder, stage)
            sys.stdout.write(f"{stage}: {whom} killed after {after:.2f} s; to recover: {needed}\n")
            seen.update([whom, needed, *(["resumed"] if RESUMED in said else [])])
        else:  # it was quicker
            said = process.communicate()[0]
            assert process.returncode == 0, said
    done = sh(folder, *REPRO, stage)
    seen.update(["resumed"] if RESUMED in done.stdout + done.stderr else [])
    return seen


def check_recovered(folder: Path, reference: Reference) -> None:
    """The checkout is what an undisturbed one is: lock, outputs, files in git, scratch; and nothing runs in it."""
    sh(folder, "dvc", "repro")
    assert (folder / "dvc.lock").read_bytes() == reference.lock
    assert sh(folder, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    sh(folder, "git", "add", "-A")
    names = sh(folder, "git", "diff", "--cached", "--name-only", "HEAD").stdout.split()
    assert names == sh(reference.folder, "git", "diff", "--name-only", "HEAD~", "HEAD").stdout.split()
    left = scratch_left(folder) - scratch_left(reference.folder)
    assert max(left.values(), default=0) <= 1, f"what a killed run leaves is swept by the stage's next run, and does not pile up: {left}"
    assert left_running(folder) == []


def test_fifty_kills_leave_the_lock_of_an_undisturbed_run(reference: Reference, tmp_path: Path) -> None:
    seed = int(os.environ.get("TRUNKLINE_SEED") or secrets.randbelow(2**32))
    sys.stdout.write(f"TRUNKLINE_SEED={seed}\n")
    draw, folder, seen = random.Random(seed), small_tiny(tmp_path / "trunkline"), Counter[str]()
    for stage in EVERYTHING:
        seen += kill_during(folder, stage, reference.seconds[stage], draw)
    sys.stdout.write(f"{dict(seen)}\n")
    assert seen["group"] + seen["stage"] >= 50
    assert min(seen["group"], seen["stage"]) >= 10
    check_recovered(folder, reference)


def test_tune_goes_on_from_its_last_checkpoint_and_ends_in_the_same_bytes(spare: Path, reference: Reference) -> None:
    command = ("dvc", "repro", "--force", "--single-item", "tune")
    process = start(spare, *command)
    while not list((spare / ".dvc/tmp/trunkline/tune").glob("*/checkpoint-*/sealed.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = sh(spare, *command)
    assert RESUMED in done.stdout + done.stderr
    assert (spare / "dvc.lock").read_bytes() == reference.lock
    assert not (spare / ".dvc/tmp/trunkline/tune").exists()


def scratch_left(folder: Path) -> Counter[str]:
    """What lies in the scratch folder, by name, without the random part."""
    return Counter(re.sub(r"-[a-z0-9_]{8}(?=$|\.lock$)", "", path.name) for path in (folder / ".dvc/tmp/trunkline").iterdir())


@contextmanager
def on_a_small_disk(folder: Path) -> Iterator[None]:
    """Put a folder, with what it holds, on a disk of its own."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    try:
        if mounted.returncode:
            pytest.skip(f"a small disk needs root: {mounted.stderr.strip()}")
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
        yield
        shutil.rmtree(aside)
        shutil.copytree(folder, aside, symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
        folder.rmdir()
        aside.rename(folder)


def fill(folder: Path, spare: int) -> Path:
    """Leave so many bytes on the disk of a folder; returns the file that takes the others."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        for _ in range((shutil.disk_usage(folder).free - spare) // 4096):
            file.write(bytes(4096))
    return filler


def told(said: str, stage: str) -> str:
    """The sentence with which a stage stopped; there is no traceback beside it."""
    assert "Traceback" not in said, said
    found = re.search(rf"^{stage} stopped (.*)$", said, re.MULTILINE)
    assert found, said
    return found[1]


def check_put_right(folder: Path, reference: Reference, repro: tuple[str, ...] = ("dvc", "repro")) -> None:
    """After the next run: the lock of an undisturbed one, and everything in place."""
    sh(folder, *repro)
    assert (folder / "dvc.lock").read_bytes() == reference.lock
    assert sh(folder, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize(
    ("stage", "place", "spare_bytes"),
    [
        ("collect", "data", 200_000),
        ("preprocess", "data", 500_000),
        ("preprocess", ".dvc/tmp", 300_000),
        ("validate", "data", 500_000),
        ("select", "models", 500_000),
        ("tune", ".dvc/tmp", 7_500_000),  # room for one checkpoint
        ("export", "models", 500_000),
        ("evaluate", ".dvc/tmp", 300_000),
        ("redteam", "models", 20_000),
        ("package", "models", 400_000),
    ],
)
def test_a_full_disk_is_a_sentence_and_nothing_is_lost(spare: Path, reference: Reference, stage: str, place: str, spare_bytes: int) -> None:
    with on_a_small_disk(spare / place):
        shutil.rmtree(spare / place / "trunkline/evaluate", ignore_errors=True)  # the kept base, so that it is converted again
        if place != ".dvc/tmp":
            shutil.rmtree(spare / place / stage)  # DVC would, and give its room back
        filler = fill(spare / place, spare_bytes)
        done = sh(spare, "dvc", "repro", "--force", "--single-item", stage, check=False)
        assert done.returncode != 0
        sentence = told(done.stdout + done.stderr, stage)
        assert "No space left on device" in sentence
        assert place in sentence
        filler.unlink()
        sh(spare, "git", "checkout", "-q", "--", "data", "models")
        check_put_right(spare, reference)


def test_a_full_temporary_folder_is_a_sentence(spare: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with on_a_small_disk(small):
        fill(small, 500_000)
        monkeypatch.setenv("TMPDIR", str(small))
        done = sh(spare, "dvc", "repro", "--force", "--single-item", "package", check=False)
        assert f"No space left on device: {small}" in told(done.stdout + done.stderr, "package")
        assert [path.name for path in small.iterdir()] == ["filler"]
    monkeypatch.delenv("TMPDIR")
    check_put_right(spare, reference)


def test_a_full_dvc_cache_is_named_by_dvc_and_mended_by_the_next_repro(spare: Path, reference: Reference) -> None:
    """DVC names each file that it has no room for, and goes on without it: the next repro puts it into the cache."""
    with on_a_small_disk(spare / ".dvc/cache"):
        filler = fill(spare / ".dvc/cache", 100_000)
        change(spare / "conf/collect/attacks.yaml", "limit: 300", "limit: 299")
        done = sh(spare, "dvc", "repro", "collect", check=False)
        said = done.stdout + done.stderr
        assert re.search(rf"failed to transfer .*No space left on device: .*{re.escape(str(spare / '.dvc/cache'))}", said), said
        assert "not in cache" in sh(spare, "dvc", "status", "collect").stdout
        filler.unlink()
        sh(spare, "git", "checkout", "-q", "--", "conf")
        check_put_right(spare, reference)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write into a folder, root included."""
    done = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a read-only mount needs root: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("place", [".dvc/tmp/trunkline", ".dvc/cache"])
def test_a_read_only_cache_is_a_sentence(spare: Path, reference: Reference, place: str) -> None:
    change(spare / "conf/collect/attacks.yaml", "limit: 300", "limit: 298")
    with read_only(spare / place):
        done = sh(spare, "dvc", "repro", "collect", check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in said
    assert re.search(rf"Read-only file system: '?[^\n]*{re.escape(place)}", said), said
    sh(spare, "git", "checkout", "-q", "--", "conf")
    check_put_right(spare, reference)


@pytest.mark.parametrize("repro", [("dvc", "repro"), REPRO], ids=["dvc", "trunkline"])
@pytest.mark.parametrize("stage", ["preprocess", "tune", "package"])
def test_ctrl_c_is_a_sentence_and_the_next_repro_goes_on(spare: Path, reference: Reference, stage: str, repro: tuple[str, ...]) -> None:
    seconds = reference.seconds[stage]
    for share in (0.3, 0.6, 0.8):
        process = start(spare, *repro, "--force", "--single-item", stage)
        while not stage_processes(process.pid) and process.poll() is None:
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            process.wait(share * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        said = BAR.sub("", process.communicate()[0])
        assert "Traceback" not in said, said
        if process.returncode != 0 and DONE not in said:
            # the last: the stage was done, and Python was shutting down; DVC tells it
            assert re.search(r"interrupted|KeyboardInterrupt|Interrupted by the user|exited with -2", said), said
    check_put_right(spare, reference, REPRO)  # an interruption while DVC writes dvc.lock leaves half of it, which only this mends
    assert left_running(spare) == []


def cache_file(folder: Path, file: str) -> Path:
    """Where DVC keeps a file."""
    from stages.intact import md5

    digest = md5(folder / file)
    return folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def damage(path: Path, how: str) -> None:
    """Alter a read-only file as a failing disk does: its mode stays."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    path.chmod(mode)


@pytest.mark.parametrize("how", ["truncated", "altered"])
@pytest.mark.parametrize(("file", "reader"), [("models/tune/model/model.safetensors", "export"), ("data/preprocess/train.jsonl", "validate")])
def test_a_damaged_cache_file_is_found_named_and_made_anew(spare: Path, reference: Reference, file: str, reader: str, how: str) -> None:
    kept = cache_file(spare, file)
    damage(kept, how)
    (spare / file).unlink()
    sh(spare, "dvc", "checkout")
    assert sh(spare, "dvc", "status").stdout.strip() == "Data and pipelines are up to date.", "DVC sees it by now: then `stages.intact` has no cause"
    done = sh(spare, "dvc", "repro", "--force", "--single-item", reader, check=False)
    sentence = told(done.stdout + done.stderr, reader)
    assert "damaged" in sentence
    assert f"{file}, from {kept.relative_to(spare)}" in done.stdout + done.stderr
    assert ran(sh(spare, "dvc", "repro"))[0] == Path(file).parts[1], "made anew by its stage"
    assert (spare / "dvc.lock").read_bytes() == reference.lock
    assert sh(spare, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."


def test_a_damaged_cache_file_is_fetched_from_the_remote(spare: Path, reference: Reference, tmp_path: Path) -> None:
    file = "models/export/engine/model.bin"
    sh(spare, "dvc", "remote", "add", "--local", "--default", "here", str(tmp_path / "remote"))
    sh(spare, "dvc", "remote", "modify", "--local", "here", "verify", "true")
    sh(spare, "dvc", "push")
    kept = cache_file(spare, file)
    damage(kept, "truncated")
    (spare / file).unlink()
    sh(spare, "dvc", "checkout")
    assert "damaged" in told(sh(spare, "dvc", "repro", "-f", "-s", "redteam", check=False).stderr, "redteam")
    assert ran(sh(spare, "dvc", "repro", "--pull")) == []
    assert (spare / "dvc.lock").read_bytes() == reference.lock
    remote = tmp_path / "remote" / kept.relative_to(spare / ".dvc/cache")
    damage(remote, "truncated")
    kept.unlink()
    (spare / file).unlink()
    done = sh(spare, "dvc", "pull", check=False)
    assert done.returncode != 0
    assert "models/export" in done.stderr
    assert not kept.exists(), "with `verify` on the remote, DVC takes no damaged file into its cache"
    sh(spare, "dvc", "remote", "remove", "--local", "here")
    check_put_right(spare, reference)


def test_own_scratch_is_held_against_its_digest(spare: Path, reference: Reference) -> None:
    """Downloads, unpacked members of wheels, and the converted base."""
    scratch = spare / ".dvc/tmp/trunkline"
    shutil.copytree(reference.folder / ".dvc/tmp/trunkline/evaluate", scratch / "evaluate", dirs_exist_ok=True)
    engine = next(scratch.glob("evaluate/*/model.bin"))
    whole = engine.read_bytes()
    engine.write_bytes(whole[: len(whole) // 2])
    sh(spare, "dvc", "repro", "--force", "--single-item", "evaluate")
    assert engine.read_bytes() == whole
    member = next(path for path in scratch.glob("unpacked/**/*.json"))
    whole = member.read_bytes()
    member.write_bytes(b"[]")
    sh(spare, "dvc", "repro", "--force", "--single-item", "collect")
    assert member.read_bytes() == whole
    check_put_right(spare, reference)
