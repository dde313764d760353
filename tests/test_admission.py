"""Who is turned away, and why: no room, or a first token that would come too late."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import ServeLimits
from stages.serve.admission import AIM, Admission, Full
from tests.served import NAME, assistant, endless, model, serve, settings

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
        admission.learn(4, 8.0)  # two seconds each
    house.waiting, house.working = 1, 1
    assert not admission.full() and admission.wait() == pytest.approx(6.0)
    house.working = 2
    assert admission.full() and admission.refusal().status == 429 and admission.refusal().headers() == {"Retry-After": "8"}
    house.waiting = 0
    assert not admission.full(), "nothing waits: it is let in, and measured"
    house.waiting, house.working = 1, 2
    for _ in range(200):
        admission.learn(1, 0.1)
    assert not admission.full()


@given(st.lists(st.tuples(st.integers(1, 99), st.floats(0, 1e3)), min_size=1), st.integers(0, 9), st.integers(0, 99), st.integers(1, 8))
def test_what_is_believed_lies_among_what_was_measured(found: list[tuple[int, float]], waiting: int, working: int, count: int) -> None:
    house = House()
    house.waiting, house.working = waiting, working
    admission = house.admission()
    for place, seconds in found:
        admission.learn(place, seconds)
    costs = [0.0, *(seconds / place for place, seconds in found)]
    assert min(costs) <= admission.wait() / (waiting + working + 1) <= max(costs) * (1 + 1e-9)
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
