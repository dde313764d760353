"""`trunkline gc`: what a protected branch, a tag, production or a recent commit reaches stays and can be restored; the rest goes, or nothing does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conf.errors import ConfigError, DataError
from stages.operate.gc import Collection, collect
from stages.operate.in_production import engine
from stages.operate.reach import PROTECTED
from stages.operate.rollback import rollback
from stages.serve.wire import ModelCard, ModelList
from tests.toy import Toy

GATE = """
  gate: {cmd: "python gate.py", deps: [out/e/x], metrics: [{models/gate/verdict.json: {cache: false}}]}
"""
VERDICT = """
import hashlib, json, pathlib
pathlib.Path("models/gate").mkdir(parents=True, exist_ok=True)
text = pathlib.Path("out/e/x").read_bytes()
pathlib.Path("models/gate/verdict.json").write_text(json.dumps({"digest": hashlib.sha256(text).hexdigest()}) + "\\n")
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """One commit on main."""
    toy = Toy(tmp_path / "toy", monkeypatch)
    (toy.folder / "dvc.yaml").write_text((toy.folder / "dvc.yaml").read_text() + GATE)
    (toy.folder / "gate.py").write_text(VERDICT)
    toy.commit("First")
    yield toy


def gc(**options: object) -> Collection:
    """With no grace for what is young, unless the test gives one."""
    return collect(**{"protected": PROTECTED, "days": 0, **options})  # type: ignore[arg-type]


def cache(folder: Path) -> set[str]:
    root = folder / ".dvc/cache/files/md5"
    return {path.parent.name + path.name for path in root.rglob("*") if path.is_file()}


def runs(folder: Path) -> set[Path]:
    return {path for path in (folder / ".dvc/cache/runs").rglob("*") if path.is_file()}


def needs(folder: Path) -> set[str]:
    """Every object that the work tree's lock needs, from the cache as it is now."""
    found = set()
    for stage in yaml.load((folder / "dvc.lock").read_text(), Loader=yaml.CBaseLoader)["stages"].values():
        for md5 in (out["md5"] for out in stage["outs"]):
            found.add(md5)
            if md5.endswith(".dir"):
                found |= {file["md5"] for file in json.loads((folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).read_text())}
    return found


def outputs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "out").rglob("*")) if path.is_file()}


def on(toy: Toy, branch: str, value: int) -> str:
    """One more commit on a branch, which starts at the present one if it is new."""
    exists = branch in toy.git("branch", "--format=%(refname:short)").split()
    toy.git("checkout", "-q", *([branch] if exists else ["-b", branch]))
    toy.set({**toy.values, "b": value})
    return toy.commit(f"{branch} {value}")


def grow(toy: Toy, choose: random.Random, commits: int) -> dict[str, tuple[set[str], dict[str, bytes]]]:
    """A history of branches and tags; commit -> the objects it needs, and its outputs."""
    made = {toy.git("rev-parse", "HEAD"): (needs(toy.folder), outputs(toy.folder))}
    for number in range(commits):
        one = on(toy, choose.choice(["main", "release/1", "feature", "old"]), 10 + 2 * number)
        made[one] = (needs(toy.folder), outputs(toy.folder))
        if choose.random() < 0.2:
            toy.git("tag", f"v{number}")
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout", "--force")
    return made


def hold(toy: Toy, seed: int, commits: int) -> None:
    choose = random.Random(seed)
    made = grow(toy, choose, commits)
    keep = choose.choice([[], [choose.choice(sorted(made))]])
    most = choose.choice([None, None, 2])
    reached = ["HEAD", *keep, *toy.git("for-each-ref", "--format=%(refname)", "refs/heads/main", "refs/heads/release/", "refs/tags").split()]
    kept = {one for name in reached for one in toy.git("rev-list", *(["-n", str(most)] if most else []), name).split()}
    before = cache(toy.folder)
    looked = gc(keep=keep, most=most, dry_run=True)
    assert cache(toy.folder) == before
    assert gc(keep=keep, most=most).places == looked.places, "it does what the dry run said"
    assert cache(toy.folder) == set().union(*(made[one][0] for one in kept)), f"seed {seed}: neither more nor less"
    for one in sorted(kept):
        if one != toy.git("rev-parse", "HEAD"):
            assert rollback(to=one, dry_run=True).objects == 5
        toy.git("checkout", "-q", one)
        toy.dvc("checkout", "--force")
        assert outputs(toy.folder) == made[one][1]
        assert toy.repro() == set(), "and no stage runs"
        toy.git("checkout", "-q", "-f", "main")
        toy.dvc("checkout", "--force")


def test_what_is_kept_can_be_restored_and_nothing_else_stays(toy: Toy) -> None:
    hold(toy, seed=0, commits=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_what_is_kept_can_be_restored_over_many_histories(toy: Toy, seed: int) -> None:
    hold(toy, seed, commits=8)


def test_runs_that_lost_their_outputs_go_and_the_others_restore(toy: Toy) -> None:
    on(toy, "feature", 10)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    before = runs(toy.folder)
    found = gc()
    assert len(runs(toy.folder)) == len(before) - len(found.places[0].runs) < len(before)
    shutil.rmtree(toy.folder / "out")
    (toy.folder / "dvc.lock").unlink()
    assert toy.repro() == set(), "all that main made comes from the run-cache"
    toy.git("checkout", "-q", "-f", "feature")
    assert toy.repro() >= {"b", "d", "e"}, "what nothing reached was made anew, and not taken half"


def test_the_work_tree_stays_before_it_is_committed(toy: Toy) -> None:
    toy.set({**toy.values, "a": 8})
    toy.repro()
    wanted = needs(toy.folder)
    gc()
    assert wanted <= cache(toy.folder)


def test_a_dvc_file_keeps_what_it_names(toy: Toy) -> None:
    (toy.folder / "extra.bin").write_text("extra")
    toy.dvc("add", "-q", "extra.bin")
    toy.commit("Add a file that no stage makes")
    toy.git("rm", "-q", "extra.bin.dvc")
    toy.commit("Remove it")
    gc()
    assert hashlib.md5(b"extra").hexdigest() in cache(toy.folder)


def test_a_champion_stays_with_the_commit_that_pins_it(toy: Toy) -> None:
    champion = on(toy, "feature", 10)
    wanted = needs(toy.folder)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    (toy.folder / "params.yaml").write_text((toy.folder / "params.yaml").read_text() + f"gate: {{champion: {champion}}}\n")
    toy.git("commit", "-qam", "Pin the champion")
    gc()
    assert wanted <= cache(toy.folder)
    toy.git("branch", "-qD", "feature")
    toy.git("reflog", "expire", "--expire=now", "--all")
    toy.git("gc", "-q", "--prune=now")
    stopped(toy, DataError, "which this clone lacks")


def test_young_commits_and_young_objects_stay(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMITTER_DATE", f"{int(time.time()) - 40 * 86400} +0000")
    on(toy, "old", 10)
    old = needs(toy.folder)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    monkeypatch.setenv("GIT_COMMITTER_DATE", f"{int(time.time()) - 20 * 86400} +0000")
    on(toy, "feature", 12)
    feature = needs(toy.folder)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    main = needs(toy.folder)
    found = gc(days=30)
    assert old | feature <= cache(toy.folder)
    assert (found.places[0].gone, found.places[0].recent) == ([], len(old - main - feature)), "just written: perhaps not committed yet"
    for path in (toy.folder / ".dvc/cache").rglob("*"):
        if path.is_file():
            os.utime(path, (0, time.time() - 35 * 86400))
    gc(days=30)
    assert cache(toy.folder) == main | feature


def test_production_stays_by_digest_by_tag_and_by_address(toy: Toy) -> None:
    on(toy, "feature", 10)
    wanted = needs(toy.folder)
    digest = json.loads((toy.folder / "models/gate/verdict.json").read_text())["digest"]
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    body = ModelList(data=[ModelCard(id="m", digest=digest)]).model_dump_json().encode()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert [engine(named) for named in (address, f"{address}/v1/", f"m:{digest}", f"sha256:{digest[:12]}")] == [digest, digest, digest, digest[:12]]
    gc(in_production=[address])
    assert wanted <= cache(toy.folder)
    server.shutdown()
    server.server_close()
    stopped(toy, DataError, "does not say which model it serves: ConnectionError", in_production=[address])
    stopped(toy, DataError, "no commit's dvc.lock explains", in_production=["0" * 64])
    stopped(toy, ConfigError, "is no digest of an engine", in_production=["latest"])
    gc()
    assert not wanted <= cache(toy.folder)


def test_a_verdict_that_the_lock_does_not_hold_explains_nothing(toy: Toy) -> None:
    (toy.folder / "models/gate/verdict.json").write_text(json.dumps({"digest": "a" * 64}))
    toy.git("commit", "-qam", "Written by hand")
    stopped(toy, DataError, "no commit's dvc.lock explains", in_production=["a" * 64])


def stopped(toy: Toy, error: type[Exception], match: str, **options: object) -> None:
    """It is told, and nothing was deleted."""
    before = cache(toy.folder), runs(toy.folder)
    with pytest.raises(error, match=match):
        gc(**options)
    assert (cache(toy.folder), runs(toy.folder)) == before


def test_what_cannot_be_known_stops_it(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(toy, "feature", 10)
    stopped(toy, ConfigError, "no branch is named nothing-like-it", protected=["nothing-like-it"])
    stopped(toy, ConfigError, "no remote is configured", cloud=True)
    toy.git("checkout", "-q", "--detach")
    stopped(toy, ConfigError, "HEAD is detached")
    toy.git("checkout", "-q", "main")
    (toy.folder / "dvc.lock").write_text("stages: {a: [half\n")
    toy.git("commit", "-qam", "Break the lock")
    toy.git("revert", "--no-edit", "HEAD")
    stopped(toy, DataError, r"dvc\.lock of [0-9a-f]{12} cannot be read")
    toy.git("reset", "-q", "--hard", "HEAD~2")
    toy.git("clone", "-q", "--depth=1", f"file://{toy.folder}", str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    with pytest.raises(ConfigError, match="this clone is shallow"):
        gc()
    monkeypatch.chdir(toy.folder)
    toy.dvc("cache", "dir", "--local", str(tmp_path / "elsewhere"))
    stopped(toy, ConfigError, "lies outside of this checkout")


def test_a_listing_that_is_nowhere_stops_it(toy: Toy) -> None:
    lost = next(md5 for md5 in sorted(needs(toy.folder)) if md5.endswith(".dir"))
    (toy.folder / ".dvc/cache/files/md5" / lost[:2] / lost[2:]).unlink()
    stopped(toy, DataError, f"1 folders that are reached have no listing .*{lost}")
    gc(allow_missing=True)


def test_the_remote_is_cleaned_by_the_same_rule(toy: Toy, tmp_path: Path) -> None:
    store = tmp_path / "store"
    toy.dvc("remote", "add", "-q", "-d", "store", str(store))
    toy.commit("Keep artefacts in the store")
    on(toy, "feature", 10)
    toy.dvc("push", "--run-cache")
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    toy.dvc("push", "--run-cache")
    wanted, lying = needs(toy.folder), {path for path in (store / "files").rglob("*") if path.is_file()}
    gc()
    assert {path for path in (store / "files").rglob("*") if path.is_file()} == lying, "without --cloud the remote is left alone"
    place = gc(cloud=True).places[1]
    left = {path.parent.name + path.name for path in (store / "files").rglob("*") if path.is_file()}
    in_git = {hashlib.md5((toy.folder / name).read_bytes()).hexdigest() for name in ("out/m.json", "models/gate/verdict.json")}
    assert left == wanted - in_git, "all that was pushed of it"
    assert len(place.gone) == len(lying) - len(left)
    assert place.runs
    shutil.rmtree(toy.folder / ".dvc/cache")
    shutil.rmtree(toy.folder / "out")
    toy.git("checkout", "--", "out")
    toy.dvc("pull")
    toy.dvc("pull", "--run-cache")
    assert toy.repro() == set()
    toy.git("clone", "-q", "--bare", str(toy.folder), str(tmp_path / "bare"))
    toy.git("remote", "add", "origin", str(tmp_path / "bare"))
    toy.git("fetch", "-q", "origin")
    gc(cloud=True)
    toy.git("clone", "-q", str(tmp_path / "bare"), str(tmp_path / "other"))
    for command in (["config", "user.email", "o@example.org"], ["config", "user.name", "O"], ["commit", "-qm", "New", "--allow-empty"], ["push", "-q"]):
        toy.git("-C", str(tmp_path / "other"), *command)
    stopped(toy, DataError, r"1 references of git's remotes were not fetched, as origin refs/heads/", cloud=True)
