"""Who is turned away, and why: no room, or a first token that would come too late."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import ServeLimits
from stages.serve.admission import AIM, Admission, Expected, Full
from stages.serve.engine import Sampling
from stages.serve.jobs import Job, Queue
from stages.serve.keys import Key, make
from stages.serve.text import TextStream
from tests.served import NAME, Served, assistant, endless, model, serve, settings

ASK = {"model": NAME, "messages": [{"role": "user", "content": "where is my order"}], "max_tokens": 4}


class House:
    """How many wait and work."""

    waiting, working = 0, 0

    def admission(self, most: int = 8, first_token: float = 10.0) -> Admission:
        return Admission(most, first_token, lambda: self.waiting, lambda: self.working)


def test_there_is_room_for_so_many() -> None:
    house = House()
    admission = house.admission(most=3)
    house.waiting = 1
    assert not admission.full(2) and admission.full(3)
    with admission.entering(1):
        assert not admission.full(1) and admission.full(2)
        with pytest.raises(Full), admission.entering(2):
            pytest.fail("there is no room")
    with pytest.raises(ZeroDivisionError), admission.entering(2):
        assert admission.full(1)
        _ = 1 / 0
    assert not admission.full(2), "what failed on its way gives its room back"


def test_whoever_would_wait_too_long_is_turned_away_until_it_is_quiet() -> None:
    house = House()
    admission = house.admission(first_token=10.0)
    for _ in range(200):
        admission.learn(4, AIM * 12, 1.0)  # a share of three tenths of the aim each
    house.waiting, house.working = 1, 1
    assert not admission.full() and admission.wait() == pytest.approx(AIM * 9)
    house.working = 2
    assert admission.full() and admission.refusal().status == 429 and admission.wait() == pytest.approx(AIM * 12)
    assert admission.refusal().headers() == {"Retry-After": str(math.ceil(admission.wait()))}
    house.waiting = 0
    assert not admission.full(), "nothing waits: it is let in, and measured"
    house.waiting, house.working = 1, 2
    for _ in range(200):
        admission.learn(1, 0.1, 0.1)
    assert admission.full(), "who is alone says nothing of what others wait for"
    for _ in range(200):
        admission.learn(2, 0.1, 0.1)
    assert not admission.full()


def test_whoever_comes_in_is_told_how_many_are_before_it() -> None:
    house = House()
    admission = house.admission()
    house.waiting, house.working = 1, 2
    with admission.entering(2) as before, admission.entering(1) as then:
        assert (before, then) == (3, 5)


def test_whoever_waits_is_late_once_its_first_token_could_not_come_in_time() -> None:
    house = House()
    admission = house.admission(first_token=10.0)
    assert not admission.late(10.0) and admission.late(10.1)
    for _ in range(500):
        admission.learn(4, 8.0, 2.0)  # two seconds from the beginning of the work to the first token
    assert not admission.late(7.9) and admission.late(8.1)
    for _ in range(500):
        admission.learn(4, 8.0, 0.5)
    admission.learn(4, 8.0, 3.0)
    for _ in range(20):
        admission.learn(4, 8.0, 0.5)
    assert admission.late(8.0), "the slowest one is remembered for a while"
    for _ in range(500):
        admission.learn(4, 40.0, 30.0)
    assert not admission.late(AIM * 10) and admission.late(AIM * 10 + 0.1), "who hardly waited is answered, however slow the work is"
    assert not Admission(8, float("inf"), lambda: 0, lambda: 0).late(1e9), "nothing was promised"


def waiting(queue: Queue, *seconds: float, begun: bool = False, alone: bool = False) -> list[Job]:
    """One request's answers, which have waited for so long."""
    now = time.monotonic()
    jobs = [
        Job(
            prompt=[1],
            sampling=Sampling(max_tokens=4),
            text=TextStream(None),
            on_text=lambda _: None,
            on_end=lambda: None,
            deadline=now + 600,
            arrived=now - ago,
        )  # type: ignore[arg-type]
        for ago in seconds
    ]
    for job in jobs:
        job.place = 1 if alone else 2
    if begun:
        jobs[0].begin()
    queue.submit(jobs)
    return jobs


def test_a_queue_turns_away_what_is_late_and_nothing_that_was_begun() -> None:
    queue = Queue(8, first_token=1000.0)
    late, fresh = waiting(queue, 1001.0, 1001.0), waiting(queue, 1.0)
    begun, alone = waiting(queue, 1001.0, 1001.0, begun=True), waiting(queue, 1001.0, alone=True)
    queue.sift()
    assert list(queue.waiting) == [*fresh, *begun, *alone], "who found nobody before it is measured, however long it takes"
    assert [job.reason for job in late] == ["late", "late"] and [job.started for job in late] == [None, None]
    assert late[0].failure is not None and late[0].failure.status == 429 and int(late[0].failure.headers()["Retry-After"]) >= 100
    assert queue.admission.wait() > 500, "it was learned how long it takes"


def test_a_request_is_begun_with_whichever_of_its_answers_begins() -> None:
    queue = Queue(8, first_token=1000.0)
    jobs = waiting(queue, 1001.0, 1001.0, 1001.0)
    queue.waiting.remove(jobs[1])
    jobs[1].begin()  # another length than the first one's, as `Slots` takes them
    queue.sift()
    assert list(queue.waiting) == [jobs[0], jobs[2]]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Served, str]]:
    """A service whose engine does nothing before it is told to, and a key of two requests a minute."""
    wanted = settings("ctranslate2", limits=ServeLimits(waiting=64, first_token_seconds=0.5))  # whose work can be held
    secret, entry = make("few", ["answer"], None)
    engine = model(tmp_path)
    with serve(engine, tmp_path, wanted, [Key(**(entry | {"requests_per_minute": 2, "tokens_per_minute": 10_000}))]) as served:  # type: ignore[arg-type]
        time.sleep(max(0.0, time.time() % 60 - 45) and 60 - time.time() % 60)  # a budget counts less and less of the minute before this one
        yield served, secret


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_waited_in_vain_is_a_429_that_costs_its_key_nothing(slow: tuple[Served, str], tmp_path: Path, stream: bool) -> None:
    served, secret = slow
    engine, gate, busy = served.assistant.engine, threading.Event(), threading.Semaphore(0)
    decode = engine.decode

    def held(*given: object) -> None:
        busy.release()
        assert gate.wait(60)
        decode(*given)  # type: ignore[arg-type]

    engine.decode = held  # type: ignore[method-assign]
    url, headers = f"{served.url}/v1/chat/completions", {"authorization": f"Bearer {secret}"}

    def ask(n: int) -> httpx.Response:
        return httpx.post(url, json=ASK | {"n": n, "stream": stream}, headers=headers, timeout=60)

    with ThreadPoolExecutor(2) as pool:
        try:
            begun = pool.submit(ask, 2)  # takes both slots
            for _ in range(2):
                assert busy.acquire(timeout=60)
            vain = pool.submit(ask, 1)
            while not served.app.state.scheduler.waiting:
                time.sleep(0.01)
            time.sleep(1)
        finally:
            gate.set()
        assert begun.result().status_code == 200
        reply = vain.result()
    assert reply.status_code == 429 and reply.json()["error"]["code"] == "overloaded" and int(reply.headers["retry-after"]) >= 1
    assert ask(1).status_code == 200, "what was turned away does not count"
    assert httpx.post(url, json=ASK, headers=headers).json()["error"]["code"] == "rate_limit_exceeded", "what was answered does"
    served.app.state.store.close()
    with closing(sqlite3.connect(tmp_path / "events.sqlite")) as database:
        rows = database.execute("select status, finish_reason, completion_tokens from events order by at").fetchall()
    assert json.dumps(rows[1]) == '[429, "late", 0]', rows


def test_a_full_queue_costs_a_key_nothing_at_the_door_and_behind_it(slow: tuple[Served, str]) -> None:
    served, secret = slow
    admission, headers = served.app.state.scheduler.admission, {"authorization": f"Bearer {secret}"}

    def ask(n: int) -> httpx.Response:
        return httpx.post(f"{served.url}/v1/chat/completions", json=ASK | {"n": n}, headers=headers, timeout=60)

    admission._entering = 64
    found = [ask(1) for _ in range(4)]
    admission._entering = 63  # one may come in; behind the door two are too many
    found += [ask(2) for _ in range(4)]
    admission._entering = 0
    assert {(reply.status_code, reply.json()["error"]["code"]) for reply in found} == {(429, "overloaded")}
    assert [ask(1).status_code for _ in range(3)] == [200, 200, 429]


@given(st.floats(0, 5), st.floats(0, 1), st.integers(3, 20))
def test_what_all_wait_for_is_told_from_what_each_one_costs(base: float, each: float, most: int) -> None:
    expected = Expected()
    for i in range(600):
        place = 1 + i % most
        expected.learn(place, base + each * place)
    for place in (1, most, 2 * most):
        right = base + each * place
        assert 0.8 * right <= expected.seconds(place) + 1e-9 and expected.seconds(place) <= right + 0.5 * base + 1e-9


def test_two_that_waited_for_a_batch_do_not_turn_sixteen_away() -> None:
    house = House()
    admission = house.admission(most=64, first_token=5.0)
    for place, seconds in [(1, 0.1), (2, 1.2), (3, 1.3), (1, 0.1), (2, 1.1), (4, 1.2), (8, 1.4)] * 4:
        admission.learn(place, seconds, 0.1)
    house.waiting, house.working = 7, 8
    assert not admission.full() and 1.2 < admission.wait() < AIM * 5


@given(st.lists(st.tuples(st.integers(1, 99), st.floats(0, 1e3)), min_size=1), st.integers(0, 9), st.integers(0, 99), st.integers(1, 8))
def test_what_is_believed_is_never_more_than_was_measured_and_grows_with_the_house(
    found: list[tuple[int, float]], waiting: int, working: int, count: int
) -> None:
    house = House()
    house.waiting, house.working = waiting, working
    admission = house.admission()
    for place, seconds in found:
        admission.learn(place, seconds, 0.0)
    longest, dearest = max(seconds for _, seconds in found), max(seconds / place for place, seconds in found)
    assert 0 <= admission.wait() <= admission.wait(2) <= (longest + (waiting + working + 2) * dearest) * (1 + 1e-9)
    assert admission.full(count) <= admission.full(count + 1), "more never fit where fewer do not"
    assert not admission.full(count) or waiting + count > 8 or (waiting and admission.wait(count) > AIM * 10)


def test_the_service_turns_away_what_would_come_too_late_and_answers_again_when_it_is_quiet(tmp_path: Path) -> None:
    wanted = settings(limits=ServeLimits(waiting=64, first_token_seconds=0.05), max_tokens=100_000)
    engine = model(tmp_path)
    made = assistant(engine, wanted)
    endless(made.engine)
    with serve(engine, tmp_path, wanted, made=made) as served:
        url, found = f"{served.url}/v1/chat/completions", Counter[int]()
        assert httpx.post(url, json=ASK).status_code == 200

        def client(number: int) -> None:
            with httpx.stream("POST", url, json=ASK | {"max_tokens": 400, "stream": True}, timeout=120) as reply:
                *_, last = (line for line in reply.iter_lines() if line)
            found[reply.status_code] += 1
            assert last == "data: [DONE]" if reply.status_code == 200 else int(reply.headers["retry-after"]) >= 1

        with ThreadPoolExecutor(40) as pool:  # there is room for 64
            started = []
            for number in range(120):
                started.append(pool.submit(client, number))
                time.sleep(0.02)
        for each in started:
            each.result()
        assert set(found) == {200, 429} and found.total() == 120, found
        assert served.app.state.scheduler.admission.wait() < 30 and threading.active_count() < 200
        assert httpx.post(url, json=ASK).status_code == 200
