"""Events and ratings on SQLite and on a real PostgreSQL: written, removed, and neither a kill, a restart nor a bad row loses what was acknowledged."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from conf.errors import ConfigError
from stages.serve import metrics
from stages.serve.database import VARIABLE, connect
from stages.serve.removal import expire, forget
from stages.serve.store import Store
from tests.postgres import Postgres, postgres
from tests.served import DIGEST, NAME, model, process

ASK = {"model": NAME, "messages": [{"role": "user", "content": "where is my order"}], "max_tokens": 3}
ROW = {
    "digest": DIGEST, "commit": None, "key": None, "user": None, "route": "x", "streamed": False, "status": 200, "finish_reason": "stop", "prompt_tokens": 1,
    "completion_tokens": 1, "queue": 0.1, "prefill": 0.1, "first": 0.2, "total": 0.3, "verdict": {"allowed": True}, "question": None, "answer": None,
}  # fmt: skip
RATING = {"rating": "up", "digest": DIGEST, "comment": None}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as started:
        yield started


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'events.sqlite'}"
    return fresh(request.getfixturevalue("server"))


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


def fresh(server: Postgres) -> str:
    with opened(server.url) as engine, engine.begin() as connection:
        connection.execute(text("drop table events, ratings, removals"))
    return server.url


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    with opened(url) as engine, engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def outcomes() -> Counter[str]:
    samples = next(iter(metrics.EVENTS.collect())).samples
    return Counter({sample.labels["outcome"]: int(sample.value) for sample in samples if sample.name.endswith("_total")})


def filled(url: str) -> None:
    """Five events of two users and two keys, one of them old, and ratings."""
    store = Store(url, 30)
    for name, user, key, days in (("0", "ann", "web", 0), ("1", "bob", "web", 0), ("2", "ann", "app", 0), ("3", "ann", "web", 29), ("4", None, None, 0)):
        store.put(ROW | {"id": name, "user": user, "key": key, "at": time.time() - days * 86_400, "question": f"the tulips of {user}"})
    for answer, user in (("0", "ann"), ("1", "bob"), ("0", "bob"), ("9", "ann")):
        store.rate(RATING | {"at": time.time(), "answer_id": answer, "user": user, "key": "web"})
    store.close()


def test_what_is_too_old_goes_in_pieces_and_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(url)
    assert rows(url, "select id, verdict is null from events order by id")[3] == ("3", False)
    Store(url, 30).close()
    assert len(rows(url, "select id from events")) == 5 and rows(url, "select * from removals") == []
    monkeypatch.setattr("stages.serve.removal.PIECE", 2)
    with opened(url) as engine:
        assert [expire(engine, days) for days in (10, 10, 0, 0, 0)] == [1, 0, 2, 2, 0]
    assert rows(url, "select why, user_sha256, key, events, ratings from removals") == [("retention", None, None, count, 0) for count in (1, 2, 2)]
    assert len(rows(url, "select * from ratings")) == 4


def test_a_running_store_removes_what_is_too_old(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(url)
    monkeypatch.setattr("stages.serve.removal.PIECE", 2)
    store = Store(url, 0)
    for _ in range(50):
        if rows(url, "select * from events") == []:
            break
        time.sleep(0.1)
    store.close()
    assert sum(int(str(row[0])) for row in rows(url, "select events from removals")) == 5


@pytest.mark.parametrize(
    ("arguments", "said", "events", "ratings"),
    [
        (["ann"], "removed 3 events and 3 ratings\n", ["1", "4"], [("1", "bob")]),
        (["ann", "--key", "app"], "removed 1 events and 0 ratings\n", ["0", "1", "3", "4"], None),
        (["--key", "web"], "removed 3 events and 4 ratings\n", ["2", "4"], []),
        (["nobody"], "removed 0 events and 0 ratings\n", ["0", "1", "2", "3", "4"], None),
    ],
    ids=["user", "user-of-key", "key", "nobody"],
)
def test_what_is_kept_of_a_user_or_a_key_is_removed_and_told(
    url: str, arguments: list[str], said: str, events: list[str], ratings: list[tuple[str, str]] | None
) -> None:
    filled(url)
    done = command(url, "forget", *arguments)
    assert (done.returncode, done.stdout) == (0, said)
    assert [row[0] for row in rows(url, "select id from events order by id")] == events
    left = rows(url, 'select answer_id, "user" from ratings')
    assert left == ratings if ratings is not None else len(left) == 4
    told = [json.loads(line) for line in command(url, "removals").stdout.splitlines()]
    user = None if arguments[0] == "--key" else hashlib.sha256(arguments[0].encode()).hexdigest()
    counts = [int(word) for word in said.split() if word.isdigit()]
    assert [(row["why"], row["user_sha256"], row["events"], row["ratings"]) for row in told] == [("forgotten", user, *counts)]
    assert arguments[0] not in json.dumps(told)


def command(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "stages.serve.store", *arguments], env=os.environ | {VARIABLE: url}, capture_output=True, text=True)


def test_forget_wants_somebody_and_names_no_password(server: Postgres) -> None:
    for none in ([], [""], ["", "--key", ""]):
        done = command(server.url, "forget", *none)
        assert done.returncode == 2 and "name a user, a key (--key), or both" in done.stderr
    with opened(server.url) as engine, pytest.raises(ValueError, match="neither"):
        forget(engine, None)
    done = command("postgresql+psycopg://trunkline:s3cret@127.0.0.1:1/none", "removals")
    assert done.returncode == 1 and VARIABLE in done.stderr and "s3cret" not in done.stderr and "Traceback" not in done.stderr
    for wrong in ("mysql://u:s3cret@h/d", "nothing://u:s3cret@h/d"):
        with pytest.raises(ConfigError, match=VARIABLE) as caught:
            connect(wrong)
        assert "s3cret" not in str(caught.value)


def test_nothing_of_a_forgotten_text_is_left_in_the_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'events.sqlite'}"
    store = Store(url, 30)  # of a service that runs on
    for number in range(100):
        user = ("ann", "bob")[number % 2]
        store.put(ROW | {"id": str(number), "user": user, "at": time.time(), "question": f"the tulips of {user} " * 200})

    def kept(user: str) -> set[str]:
        """Files that hold the text; read by another process, because closing the file here would give up SQLite's locks of this one."""
        files = list(tmp_path.glob("events.sqlite*"))
        found = subprocess.run(["grep", "-l", f"the tulips of {user}", *files], capture_output=True, text=True).stdout
        return {Path(line).name for line in found.splitlines()}

    while len(rows(url, "select id from events")) < 100:
        time.sleep(0.1)
    with opened(url) as engine, engine.connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    store.put(ROW | {"id": "late", "user": "ann", "at": time.time(), "question": "the tulips of ann " * 200})
    while rows(url, "select id from events where id = 'late'") == []:
        time.sleep(0.1)
    assert kept("ann") == {"events.sqlite", "events.sqlite-wal"}
    assert command(url, "forget", "ann").stdout == "removed 51 events and 0 ratings\n"
    assert kept("ann") == set() and kept("bob") == {"events.sqlite"}
    store.close()


def test_one_bad_row_does_not_take_its_batch_with_it(url: str, caplog: pytest.LogCaptureFixture) -> None:
    bad = {
        "3": {"total": None}, "40": {"total": None, "question": "my own words"}, "41": {"status": "many"}, "77": {"verdict": {"score": object()}}, "98": {"status": 2**70},
    }  # fmt: skip
    before = outcomes()
    store = Store(url, 30)
    for number in range(100):
        store.put(ROW | {"id": str(number), "at": time.time(), "answer": "a\0b"} | bad.get(str(number), {}))
    store.close()
    written = {row[0] for row in rows(url, "select id from events")}
    refused = {str(number) for number in range(100)} - written
    assert refused == set(bad) - ({"41"} if url.startswith("sqlite") else set()), "SQLite takes a text for a number"
    assert outcomes() - before == Counter(written=len(written), refused=len(refused))
    assert set(rows(url, "select answer from events")) == {("a\N{REPLACEMENT CHARACTER}b",)}
    assert "an event was refused" in caplog.text and "my own words" not in caplog.text


def test_a_batch_that_was_written_already_is_not_written_twice(url: str) -> None:
    before = outcomes()
    for _ in range(2):
        store = Store(url, 30)
        for name in ("1", "2"):
            store.put(ROW | {"id": name, "at": 1e12})
        store.close()
    assert len(rows(url, "select id from events")) == 2 and outcomes() - before == Counter(written=4)


def test_several_services_may_open_a_new_database_together(url: str) -> None:
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            engines = list(pool.map(connect, [url] * 16))
        with engines[0].begin() as connection:
            for table in ("events", "ratings", "removals"):
                connection.execute(text(f"drop table {table}"))
        for engine in engines:
            engine.dispose()


def test_a_kill_loses_no_acknowledged_rating_and_no_event_older_than_the_flush(url: str, engine: Path, tmp_path: Path) -> None:
    with process(engine, tmp_path, os.environ, events=url) as (address, service):
        acknowledged: list[str] = []
        answered: list[tuple[float, str]] = []

        def rate() -> None:
            try:
                for number in range(10_000):
                    reply = httpx.post(f"{address}/v1/chat/completions", json=ASK)
                    answered.append((time.monotonic(), reply.json()["id"]))
                    name = f"cmpl-{number:032x}"
                    if httpx.post(f"{address}/v1/feedback", json={"id": name, "rating": "up"}).status_code == 200:
                        acknowledged.append(name)
            except httpx.TransportError:
                return

        rater = threading.Thread(target=rate)
        rater.start()
        while len(acknowledged) < 25:
            time.sleep(0.01)
        service.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        rater.join(30)
    stored = {row[0] for row in rows(url, "select answer_id from ratings")}
    assert set(acknowledged) <= stored and len(acknowledged) >= 25
    written = {row[0] for row in rows(url, "select id from events")}
    assert {name for at, name in answered if at < killed - 2} <= written and written


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stop", "crash"])
def test_the_service_answers_on_and_loses_no_event_while_postgresql_restarts(server: Postgres, engine: Path, tmp_path: Path, how: signal.Signals) -> None:
    url = fresh(server)
    with process(engine, tmp_path, os.environ, events=url) as (address, service):
        answered = [ask(address)]
        time.sleep(1)
        server.stop(how)
        try:
            answered += [ask(address) for _ in range(5)]
            time.sleep(1)
            reply = httpx.post(f"{address}/v1/feedback", json={"id": answered[0], "rating": "up"}, timeout=30)
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "store_unavailable"
            assert 'trunkline_events_total{outcome="dropped"}' not in httpx.get(f"{address}/metrics").text
        finally:
            server.start()
        assert httpx.post(f"{address}/v1/feedback", json={"id": answered[0], "rating": "up"}, timeout=30).status_code == 200
        answered.append(ask(address))
        service.send_signal(signal.SIGTERM)
        service.wait(60)
    assert {row[0] for row in rows(url, "select id from events where route = '/v1/chat/completions'")} == set(answered)
    assert rows(url, "select answer_id from ratings") == [(answered[0],)]


def ask(address: str) -> str:
    began = time.monotonic()
    reply = httpx.post(f"{address}/v1/chat/completions", json=ASK, timeout=30)
    assert reply.status_code == 200 and time.monotonic() - began < 10
    return str(reply.json()["id"])


def test_a_database_that_never_comes_back_costs_events_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.serve.store.PATIENCE", 1.0)
    before = outcomes()
    with postgres() as own:
        store = Store(own.url, 30)
        own.stop()
        store.put(ROW | {"id": "1", "at": time.time()})
        with pytest.raises(SQLAlchemyError):
            store.rate(RATING | {"at": 1.0, "answer_id": "1"})
        for _ in range(200):
            if outcomes()["dropped"] > before["dropped"]:
                break
            time.sleep(0.1)
        store.put(ROW | {"id": "2", "at": time.time()})
        store.close()
        assert outcomes() - before == Counter(dropped=2)
        own.start()
