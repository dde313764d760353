"""How fast champion and candidate answer on this machine: the same messages, one at a time, in turns, so that noise falls on both."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import DataError
from stages.operate.review.snapshot import ENGINE, Snapshot

if TYPE_CHECKING:
    from stages.serve.engine import Engine

MESSAGES = 16
MOST_TOKENS = 64
QUESTIONS = "data/preprocess/test.jsonl"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What one model took."""

    seconds: list[float]
    """For each message."""
    tokens: int
    """Generated for all of them together."""

    def quantile(self, share: float) -> float:
        """Seconds that so large a share of the messages kept within."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def tokens_per_second(self) -> float:
        """Over all messages."""
        return self.tokens / sum(self.seconds)


def measure(production: Snapshot | None, tree: Snapshot) -> dict[str, Latency]:
    """Time `champion` (as production has it, if there is one) and `candidate`.

    Raises:
        DataError, ModelError: an engine cannot be had, or not be opened.
    """
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, side in (("champion", production), ("candidate", tree)):
            if side is not None:
                folder = Path(ENGINE) if side.revision is None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "engine"
                if side.revision is not None:
                    side.copy(ENGINE, folder)
                engines[name] = _open(folder, side.params)
        asked = tree.rows(QUESTIONS)[:MESSAGES]
        if not asked:
            raise DataError(f"{QUESTIONS} has no row", "`dvc pull`, or `trunkline repro`")
        return time_in_turns(engines, asked)


def _open(folder: Path, params: Mapping[str, Any]) -> Engine:
    import json

    from pydantic import TypeAdapter, ValidationError

    from conf.schema import EngineSettings
    from stages.serve.engine import open_engine

    try:
        settings = TypeAdapter(EngineSettings).validate_json(json.dumps(params["serve"]["engine"], default=str))
    except (ValidationError, KeyError, TypeError) as error:
        what = f"serve.engine is of another version than the code that reviews: {' '.join(str(error).split())}"
        raise DataError(what, "bring the schema's change in a change of its own, or review with --no-latency") from error
    return open_engine(folder, settings)


def time_in_turns(engines: Mapping[str, Engine], rows: list[dict[str, Any]]) -> dict[str, Latency]:
    """Ask each engine each message; the first one twice, for the first answer of a process is slower."""
    from stages.serve.engine import Sampling

    sampling = Sampling(max_tokens=MOST_TOKENS)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tokens = dict.fromkeys(engines, 0)
    for number, row in enumerate([rows[0], *rows]):
        for name, engine in engines.items():
            prompt = engine.chat.prompt([turn for turn in row["messages"] if turn["role"] != "assistant"])
            started = time.perf_counter()
            (answer,) = engine.generate([prompt], sampling)
            if number:
                seconds[name].append(time.perf_counter() - started)
                tokens[name] += len(answer.tokens)
    return {name: Latency(seconds=seconds[name], tokens=tokens[name]) for name in engines}
