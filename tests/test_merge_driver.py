"""git merges what the pipeline writes by stage and by key: after it, `dvc repro` gives what a clean run of the merged tree gives."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf import __main__ as compose_main
from conf.errors import ConfigError, DataError
from stages.operate.merge_driver import NOT_COMPOSED, drive, merge_values, setup
from stages.operate.merge_lock import merge
from stages.operate.outlook import outlook
from stages.operate.rollback import rollback
from tests.toy import Toy

ATTRIBUTES = "dvc.lock merge=binary\nparams.yaml merge=binary\nout/*.json merge=binary\n"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """One commit that was run, in a clone that was set up."""
    toy = Toy(tmp_path / "toy", monkeypatch)
    (toy.folder / "conf").mkdir()
    (toy.folder / "conf/config.yaml").write_text("")
    (toy.folder / ".gitattributes").write_text(ATTRIBUTES)
    toy.commit("Base")
    setup()
    yield toy


def entries(folder: Path) -> dict:
    return yaml.load((folder / "dvc.lock").read_text(), Loader=yaml.CBaseLoader)["stages"]


def state(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """The lock's entries, and every output."""
    return entries(folder), {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "out").rglob("*")) if path.is_file()}


def on_branches(toy: Toy, one: dict[str, int], other: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """Set values on main and on `side`, run and commit both, and merge `side` into main."""
    toy.git("checkout", "-qb", "side")
    toy.set({**toy.values, **other})
    toy.commit("Theirs")
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    toy.set({**toy.values, **one})
    toy.commit("Ours")
    return subprocess.run(["git", "merge", "-m", "Merge", "side"], check=False, capture_output=True, text=True)


def clean_run(toy: Toy, folder: Path) -> tuple[dict, dict[str, bytes]]:
    """What a clone of HEAD makes with no lock and no cache."""
    toy.git("clone", "-q", str(toy.folder), str(folder))
    (folder / "dvc.lock").unlink()
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    os.chdir(folder)
    try:
        assert toy.repro() == set("abcde")
    finally:
        os.chdir(toy.folder)
    return state(folder)


def resolve(toy: Toy, choose: random.Random) -> None:
    """What a person does after a conflict: takes one side's text of a file, and the values that params.yaml was left with."""
    for name in toy.git("diff", "--name-only", "--diff-filter=U").split():
        assert name not in ("dvc.lock", "out/m.json"), "these never conflict"
        if name == "params.yaml":
            toy.set(toy.values)
        else:
            toy.git("checkout", choose.choice(["--ours", "--theirs"]), name)
    toy.git("add", "-A")
    toy.git("commit", "-qm", "Merge", "--allow-empty")


def hold(toy: Toy, choose: random.Random, again: Path) -> None:
    """Random changes on two branches, merged: what the lock keeps is true, and a run of the rest gives what a clean run gives."""
    toy.git("checkout", "-qb", "side")
    for branch in ("side", "main"):
        toy.git("checkout", "-q", branch)
        for _ in range(choose.randrange(1, 4)):
            toy.mutate(choose)
        toy.repro()
        toy.git("add", "-A")
        toy.git("commit", "-q", "--allow-empty", "-m", branch)
    subprocess.run(["git", "merge", "--no-ff", "-m", "Merge", "side"], check=False, capture_output=True)
    resolve(toy, choose)
    left, looked = entries(toy.folder), {stage.stage: stage.outcome for stage in outlook(toy.folder, toy.values)}
    ran = toy.repro()
    assert all(looked[name] in ("runs", "may run") for name in ran), "`trunkline plan` knew it"
    wanted = clean_run(toy, again)
    assert left.items() <= entries(again).items(), "the merged lock said what is not so"
    assert state(toy.folder) == wanted


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_merge_and_a_run_are_a_clean_run(toy: Toy, seed: int, tmp_path: Path) -> None:
    hold(toy, random.Random(seed), tmp_path / "again")


@pytest.mark.slow
def test_a_merge_and_a_run_are_a_clean_run_over_many_pairs(toy: Toy, tmp_path: Path) -> None:
    fresh = shutil.copytree(toy.folder, tmp_path / "fresh")

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(choose=st.randoms(use_true_random=False))
    def examples(choose: random.Random) -> None:
        for folder in (toy.folder, tmp_path / "again"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, toy.folder)
        os.chdir(toy.folder)
        hold(toy, choose, tmp_path / "again")

    examples()


def test_stages_changed_on_one_side_each_are_both_kept(toy: Toy) -> None:
    done = on_branches(toy, {"b": 5}, {"c": 5})  # odd values change no output
    assert done.returncode == 0, done.stderr
    assert set(entries(toy.folder)) == set("abcd"), "e records all values, and both sides changed them"
    assert "1 of 5 stages are to run or be restored:\n  e: both sides changed it" in done.stderr
    assert "trunkline repro" in done.stderr
    assert toy.repro() == {"e"}
    assert list(entries(toy.folder)) == list("abcde")


def test_what_both_changed_is_run_with_what_depends_on_it(toy: Toy) -> None:
    done = on_branches(toy, {"c": 6, "a": 5}, {"c": 8, "a": 5})
    assert done.returncode == 1
    assert "CONFLICT (content): Merge conflict in params.yaml" in done.stdout
    assert "both sides changed c: 6 (ours), 8 (theirs)" in done.stderr
    assert "both sides changed c: 6 (ours), 8 (theirs)" in (toy.folder / "params.yaml").read_text()
    assert set(entries(toy.folder)) == {"a", "b"}
    assert "d: both sides changed it" in done.stderr
    assert toy.values == {"a": 5, "b": 4, "c": 6, "d": 4, "e": 4}, "ours stays, and the file can be read"


def test_dvc_alone_does_not_merge_a_lock(toy: Toy) -> None:
    versions = [str(shutil.copy("dvc.lock", toy.folder.parent / f"{side}.lock")) for side in ("ancestor", "our", "their")]
    options = [word for side, path in zip(("--ancestor", "--our", "--their"), versions, strict=True) for word in (side, path)]
    assert subprocess.run(["dvc", "git-hook", "merge-driver", *options], check=False, capture_output=True).returncode != 0


def test_a_clone_that_was_not_set_up_gets_a_conflict_and_no_mixture(toy: Toy) -> None:
    toy.git("config", "--remove-section", "merge.binary")
    done = on_branches(toy, {"a": 5}, {"d": 5})
    assert done.returncode == 1
    assert (toy.folder / "dvc.lock").read_text() == toy.git("show", "HEAD:dvc.lock") + "\n"


def test_a_rollback_never_takes_a_merged_lock(toy: Toy) -> None:
    toy.set({**toy.values, "b": 6})
    toy.commit("First")
    toy.set({**toy.values, "c": 6})
    toy.commit("Second")
    with pytest.raises(DataError, match=r"later commits changed the same lines of .*dvc\.lock"):
        rollback(["HEAD^"])


def test_a_merge_that_was_not_run_is_no_state_to_roll_back_to(toy: Toy) -> None:
    assert on_branches(toy, {"b": 5}, {"c": 5}).returncode == 0
    toy.git("tag", "merged")
    toy.repro()
    toy.git("commit", "-qam", "Run it")
    with pytest.raises(DataError, match=r"was not run whole: its dvc\.lock has no outputs of e"):
        rollback(to="merged")


def test_an_unrelated_file_and_a_broken_side_are_told(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.bin is not a file that the pipeline writes"):
        drive(tmp_path, tmp_path, tmp_path, "notes.bin")
    (tmp_path / "broken").write_text("stages: [half")
    ours = Path(shutil.copy("dvc.lock", tmp_path / "ours"))
    for broken in ("stages: [half", "stages: {a: 3}\n", "- a\n"):
        (tmp_path / "broken").write_text(broken)
        with pytest.raises(DataError):
            drive(ours, ours, tmp_path / "broken", "dvc.lock")
        assert ours.read_bytes() == (toy.folder / "dvc.lock").read_bytes()


def test_no_common_ancestor(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "none").write_text("")
    ours, theirs = (Path(shutil.copy("dvc.lock", tmp_path / side)) for side in ("ours", "theirs"))
    assert "nothing is to run" in drive(tmp_path / "none", ours, theirs, "dvc.lock")
    assert ours.read_bytes() == theirs.read_bytes()


def entry(reads: dict[str, str], makes: dict[str, str], **values: object) -> dict:
    lists = {kind: [{"path": path, "md5": md5} for path, md5 in paths.items()] for kind, paths in (("deps", reads), ("outs", makes))}
    return {"cmd": "run", **lists, **({"params": {"params.yaml": values}} if values else {})}


def test_an_entry_that_read_what_the_other_side_no_longer_makes_is_not_kept() -> None:
    base = {"a": entry({"raw": "1"}, {"out/a": "1"}), "b": entry({"out/a/x": "1", "code": "1"}, {"out/b": "1"})}
    ours = base | {"a": entry({"raw": "2"}, {"out/a": "2"})}  # its b was not run
    theirs = base | {"b": entry({"out/a/x": "1", "code": "2"}, {"out/b": "2"})}
    merged = merge(base, ours, theirs)
    assert merged.sides == {"a": "ours", "b": "theirs"}
    assert merged.again == {"b": "it read another out/a/x than a now makes"}


def test_an_entry_with_a_value_that_another_replaced_is_not_kept() -> None:
    base = {"a": entry({}, {"a": "1"}, engine={"kind": "x"}), "b": entry({}, {"b": "1"}, engine={"kind": "x"})}
    ours = base | {"a": entry({}, {"a": "2"}, engine={"kind": "y"})}
    theirs = base | {"b": entry({"code": "2"}, {"b": "2"}, engine={"kind": "x"})}
    assert merge(base, ours, theirs).again == {"b": "it ran with params.yaml: engine.kind: x, and another stage with y"}


def test_stages_that_one_side_added_or_removed() -> None:
    one = entry({}, {"a": "1"})
    base = {"a": one, "gone": one, "z": one}
    ours = {"a": one, "new": entry({}, {"n": "1"}), "gone": entry({}, {"g": "2"}), "z": one}
    theirs = {"a": one, "z": one, "last": entry({}, {"l": "1"})}
    merged = merge(base, ours, theirs)
    assert merged.sides == {"a": "ours", "new": "ours", "z": "ours", "last": "theirs"}
    assert merged.again == {}


def params(path: Path, digest: str, values: dict) -> Path:
    path.write_text(compose_main.text(values, digest))
    return path


@pytest.mark.parametrize(
    ("digests", "first"),
    [("aab", "b"), ("aba", "b"), ("abb", "b"), ("abc", None)],
)
def test_the_digest_line_names_only_a_conf_that_is_there(tmp_path: Path, digests: str, first: str | None) -> None:
    files = [params(tmp_path / str(n), digest * 64, {"x": {str(n): n}, "y": [1]}) for n, digest in enumerate(digests)]
    drive(*files, "params.yaml")
    line = files[1].read_text().splitlines(keepends=True)[0]
    assert line == (compose_main.NOTICE.format(digest=first * 64) if first else NOT_COMPOSED)
    assert yaml.safe_load(files[1].read_text()) == {"x": {"1": 1, "2": 2}, "y": [1]}


def test_values_merge_by_key() -> None:
    conflicts: list = []
    base = {"a": {"x": 1, "y": 2, "gone": 3}, "list": [1, 2], "both": 1}
    ours = {"a": {"x": 5, "y": 2, "gone": 3}, "list": [1, 2], "both": 2, "new": {"n": 1}}
    theirs = {"a": {"x": 1, "y": 2}, "list": [2], "both": 2}
    assert merge_values(base, ours, theirs, conflicts) == {"a": {"x": 5, "y": 2}, "list": [2], "both": 2, "new": {"n": 1}}
    assert conflicts == []
    merge_values(base, {"a": {"x": 5}}, {"a": {"x": 1}, "list": [3], "both": 9}, conflicts)
    assert [key for key, *_ in conflicts] == ["list", "both"], "removed here, changed there"


def test_compose_after_a_merge_composes_anew(small: Path, python) -> None:
    assert python("-m", "conf").returncode == 0
    composed = (small / "params.yaml").read_text()
    (small / "params.yaml").write_text(NOT_COMPOSED + composed.split("\n", 1)[1])
    assert python("-m", "conf", "--check").returncode == 1
    assert python("-m", "conf").returncode == 0
    assert (small / "params.yaml").read_text() == composed


def test_only_a_clone_can_be_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no git repository"):
        setup()
