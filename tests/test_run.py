"""How a stage runs as a process: exit codes, one-sentence errors, hash seed, cost record, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DataError
from stages.files import canonical, is_sealed, publish, read_jsonl, seal, sha256, write_json, write_jsonl
from stages.operate.summary import costs as read_costs
from stages.run import disk_trouble, scratch
from tests.conftest import ROOT

STAGE = "{body}\nif __name__ == '__main__':\n    from stages.run import run\n    run(main)\n"


def stage(folder: Path, body: str) -> subprocess.Popen[str]:
    (folder / "toy.py").write_text(STAGE.format(body=body))
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    env.pop("PYTHONHASHSEED", None)
    return subprocess.Popen([sys.executable, "-m", "toy"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_a_stage_that_ends_leaves_its_cost_and_has_a_fixed_hash_seed(tmp_path: Path) -> None:
    process = stage(tmp_path, "import os\ndef main():\n    print(os.environ['PYTHONHASHSEED'], hash('x'))")
    first = process.communicate()[0]
    assert process.returncode == 0
    assert first.split()[0] == "0"
    assert stage(tmp_path, (tmp_path / "toy.py").read_text().split("\nif __name__")[0]).communicate()[0] == first
    cost = json.loads((tmp_path / ".dvc/tmp/trunkline/costs.jsonl").read_text().splitlines()[0])
    assert cost["stage"] == "toy"
    assert cost["peak_bytes"] > 1_000_000


@pytest.mark.parametrize(("error", "code"), [("DataError('rows are short', 'add some')", 1), ("ConfigError('x is wrong')", 2)])
def test_a_users_mistake_is_a_sentence_with_its_exit_code(tmp_path: Path, error: str, code: int) -> None:
    process = stage(tmp_path, f"from conf.errors import *\ndef main():\n    raise {error}")
    told = process.communicate()[1]
    assert process.returncode == code
    assert "toy stopped" in told
    assert "Traceback" not in told
    assert not (tmp_path / ".dvc").exists(), "a stage that failed must not look as if it had run"


def test_a_stage_waits_for_the_one_whose_dvc_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    first = stage(
        tmp_path, "import os, time\ndef main():\n    open('began', 'w').close()\n    while not os.path.exists('go'): time.sleep(0.02)\n    print('first')"
    )
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    second = subprocess.Popen(first.args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert second.stderr is not None
    assert f"waiting for process {first.pid}, which still runs toy" in second.stderr.readline()
    (tmp_path / "go").touch()
    assert first.communicate()[0] == second.communicate()[0] == "first\n"
    assert (first.returncode, second.returncode) == (0, 0)


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    process = stage(tmp_path, "def main():\n    raise KeyError('oops')")
    assert "Traceback" in process.communicate()[1]
    assert process.returncode == 1


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    process = stage(tmp_path, "import errno\ndef main():\n    raise OSError(errno.ENOSPC, 'No space left on device', 'models/x')")
    told = process.communicate()[1]
    assert process.returncode == 1
    assert "No space left on device: models/x" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("sqlite3.OperationalError('database or disk is full')", "No space left on device"),
        ("RuntimeError('I/O error: No space left on device (os error 28)')", "No space left on device"),
        ("RuntimeError('[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/3')", "No space left on device"),
        ("ValueError('cannot save') from OSError(errno.EROFS, 'x', 'models/y')", "Read-only file system: models/y"),
        ("PermissionError(errno.EACCES, 'x', 'models/z')", "Permission denied: models/z"),
    ],
)
def test_a_disks_refusal_behind_a_librarys_error_is_told(tmp_path: Path, raised: str, words: str) -> None:
    process = stage(tmp_path, f"import errno, sqlite3\ndef main():\n    raise {raised}")
    told = process.communicate()[1]
    assert process.returncode == 1
    assert f"toy stopped {words}" in told
    assert "Traceback" not in told


def test_a_full_disk_names_what_was_being_written(tmp_path: Path) -> None:
    """`write` does not say which file it had no room for."""
    with pytest.raises(OSError, match="No space") as caught, publish(tmp_path / "models/x"), Path("/dev/full").open("w") as full:
        full.write("x")
    assert disk_trouble(caught.value) == f"No space left on device: {tmp_path / 'models/x'}"


def test_ctrl_c_during_the_imports_is_a_sentence(tmp_path: Path) -> None:
    """Before `stages.run` is there to catch it: the package itself sees to that."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    (tmp_path / "stages/slow.py").write_text("import pathlib, time\npathlib.Path('up').touch()\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-m", "stages.slow"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "interrupted before it began; `dvc repro` goes on from here.\n"
    assert process.returncode != 0


def test_half_a_line_in_the_cost_record_spoils_no_other(tmp_path: Path) -> None:
    costs = tmp_path / ".dvc/tmp/trunkline/costs.jsonl"
    costs.parent.mkdir(parents=True)
    costs.write_text('{"stage": "collect", "seconds": 1.0, "peak_bytes": 5, "at": 1}\n{"stage": "tune", "sec')
    process = stage(tmp_path, "def main():\n    pass")
    process.communicate()
    assert process.returncode == 0
    assert [json.loads(line)["stage"] for line in costs.read_text().splitlines()[::2]] == ["collect", "toy"]
    assert [cost["stage"] for cost in read_costs(costs)] == ["collect"]  # toy is no stage of the pipeline


def test_scratch_is_new_and_sweeps_only_what_the_dead_left(tmp_path: Path) -> None:
    with scratch("x", tmp_path) as living:
        (living / "kept").touch()
        for dead in ("x-dead", "x-stray"):
            (tmp_path / dead).mkdir()
        (tmp_path / "x-dead.lock").touch()
        with scratch("x", tmp_path) as other:
            assert other != living
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
                name for folder in (living, other) for name in (folder.name, f"{folder.name}.lock")
            )
        assert (living / "kept").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_seal_sees_a_short_file(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345678")
    assert not is_sealed(folder)
    seal(folder)
    assert is_sealed(folder)
    (folder / "weights").write_bytes(b"1234")
    assert not is_sealed(folder)
    (folder / "weights").write_bytes(b"12345678")
    (folder / "sealed.json").write_bytes(b"")
    assert not is_sealed(folder)


def test_ctrl_c_is_a_sentence(tmp_path: Path) -> None:
    process = stage(tmp_path, "import time, pathlib\ndef main():\n    pathlib.Path('up').touch()\n    time.sleep(60)")
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130
    assert "interrupted" in told
    assert "Traceback" not in told


def test_publish_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), publish(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_publish_replaces_a_folder_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with publish(tmp_path / "out") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize(("text", "reason"), [('{"a": 1}\n{"b"', r"x\.jsonl:2: no JSON"), ("[1]\n", r"x\.jsonl:1: a list, not an object")])
def test_a_broken_line_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        list(read_jsonl(tmp_path / "x.jsonl"))


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_canonical_json_does_not_depend_on_order(value: dict[str, object]) -> None:
    assert canonical(value) == canonical(dict(reversed(value.items())))
    assert json.loads(canonical(value)) == value


def test_jsonl_round_trips_unusual_line_breaks(tmp_path: Path) -> None:
    rows = [{"a": "x\u2028y\x85z\r\n"}, {"a": "مرحبا 🎒"}]
    assert write_jsonl(tmp_path / "x.jsonl", rows) == 2
    assert list(read_jsonl(tmp_path / "x.jsonl")) == rows


def test_the_digest_of_a_folder_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("1")
    before = sha256(tmp_path / "a")
    (tmp_path / "a/x").rename(tmp_path / "a/y")
    renamed = sha256(tmp_path / "a")
    (tmp_path / "a/y").write_text("2")
    assert len({before, renamed, sha256(tmp_path / "a")}) == 3


def test_a_published_folder_keeps_what_git_ignores_of_it(tmp_path: Path) -> None:
    out = tmp_path / "redteam"
    for text in ("first", "second"):
        with publish(out) as folder:
            folder.mkdir()
            (folder / "samples.jsonl").write_text(text)
        if text == "first":
            (out / ".gitignore").write_text("/samples.jsonl\n")
    assert (out / ".gitignore").read_text() == "/samples.jsonl\n" and (out / "samples.jsonl").read_text() == "second"
