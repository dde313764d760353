"""A damaged file of the DVC cache, with the real DVC: found where DVC takes it for whole, named, and removed with its copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import DataError
from stages.files import remove
from stages.intact import check_inputs, check_intact, md5

PIPELINE = """
stages:
  make:
    cmd: mkdir -p data/make && echo 1234567890 > data/make/rows && echo other > data/make/more && echo single > data/single
    deps: [seed]
    outs: [data/make, data/single]
  use: {cmd: cp data/make/rows data/used, deps: [data/make/rows], outs: [data/used]}
"""


def dvc(*arguments: str) -> str:
    return subprocess.run([str(Path(sys.executable).with_name("dvc")), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    subprocess.run(["git", "init", "-q"], check=True)
    dvc("init", "-q")
    Path("seed").touch()
    Path("dvc.yaml").write_text(PIPELINE)
    dvc("repro", "-q")


def damage(file: str, cache: Path = Path(".dvc/cache")) -> Path:
    """Cut the cache file of an output short, its mode unchanged, and let DVC check it out."""
    digest = md5(Path(file))
    kept = cache / "files/md5" / digest[:2] / digest[2:]
    kept.chmod(0o644)
    kept.write_bytes(kept.read_bytes()[:4])
    kept.chmod(0o444)
    Path(file).unlink()
    dvc("checkout", "-q")
    assert "up to date" in dvc("status"), "DVC sees it by now: then there is nothing to check"
    return kept


@pytest.mark.parametrize("file", ["data/make/rows", "data/single"])
def test_it_is_named_removed_and_made_anew(file: str) -> None:
    whole = Path(file).read_bytes()
    kept = damage(file)
    with pytest.raises(DataError) as caught:
        check_intact([file])
    assert f"{file}, from {kept} (4 bytes)" in str(caught.value)
    assert not kept.exists()
    assert "Running stage 'make'" in dvc("repro")
    assert Path(file).read_bytes() == whole


def test_who_is_killed_while_a_damaged_file_is_removed_leaves_what_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    damage("data/single")

    def killed(path: Path) -> None:
        remove(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.intact.remove", killed)
        check_intact(["data/single"])
    dvc("repro", "--quiet")
    if Path("data/single").read_text() != "single\n":
        with pytest.raises(DataError, match="1 file of the DVC cache"):
            check_intact(["data/single"])
        dvc("repro", "--quiet")
    assert Path("data/single").read_text() == "single\n"


def test_a_stage_checks_what_it_reads_and_nothing_else() -> None:
    damage("data/make/more")
    damage("data/single")
    check_inputs("use")
    damage("data/make/rows")
    with pytest.raises(DataError, match="1 file of the DVC cache"):
        check_inputs("use")


def test_a_cache_elsewhere_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("shared")
    Path(".dvc/cache").rename(elsewhere / "cache")
    dvc("cache", "dir", "--local", str(elsewhere / "cache"))
    kept = damage("data/make/rows", elsewhere / "cache")
    with pytest.raises(DataError, match=str(kept)):
        check_intact(["data/make"])


def test_a_file_that_a_person_changed_stays() -> None:
    Path("data/make/rows").write_text("mine")
    check_intact(["data/make"])
    assert Path("data/make/rows").read_text() == "mine"


def test_a_part_of_a_folder_is_not_taken_for_the_whole() -> None:
    Path("data/make/more").unlink()
    check_intact(["data/make/rows"])
    with pytest.raises(DataError, match=r"data/make is here in part: dvc.lock names 1 file more, as more\n.*`dvc pull data/make`"):
        check_intact(["data/make"])
    Path("data/make/rows").unlink()
    Path("data/make").rmdir()
    check_intact(["data/make"])


def test_a_part_that_was_fetched_is_put_away_and_what_a_person_made_stays() -> None:
    from stages.operate.repro import put_away_parts

    assert put_away_parts() == []
    Path("data/make/more").unlink()
    rows = Path("data/make/rows").read_text()
    Path("data/make/rows").write_text("mine")
    assert put_away_parts() == []
    Path("data/make/rows").write_text(rows)
    assert put_away_parts() == ["data/make"]
    assert not Path("data/make").exists()
    assert Path("data/single").exists()


def test_nothing_is_checked_before_the_first_run() -> None:
    Path("dvc.lock").unlink()
    check_intact(["data"])


def test_half_a_lock_is_told() -> None:
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  make:\n    cmd: x\n    out")
    with pytest.raises(DataError, match=r"dvc.lock is no YAML.*\n.*trunkline repro"):
        check_intact(["data"])
