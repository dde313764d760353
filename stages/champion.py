"""The champion's rows beside the candidate's: had from git and DVC at its revision, joined, refused when they differ, compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import JsonValue

from conf.errors import DataError
from conf.schema import Relative

if TYPE_CHECKING:
    from stages.statistics import Comparison

Json = dict[str, JsonValue]
Pairs = dict[tuple[str, str], list[float]]
"""(doc_hash, phrasing) -> scores; more than one where a row occurs more than once."""


def number(value: object) -> float | None:
    """The value if it is a finite number; null, NaN, `N/A` and true are none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def read_champion(revision: str, task: str) -> tuple[Json, list[Mapping[str, JsonValue]]]:
    """A task's entry in the champion's scores.json, and its rows.

    Raises:
        DataError: the revision, or a file of it, cannot be had; or the champion did not measure the task.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError
    from scmrepo.exceptions import SCMError

    def read(path: str) -> str:
        try:
            return str(DVCFileSystem(".", rev=revision).read_text(path, encoding="utf-8"))
        except (DvcException, DataIndexDirError, SCMError, OSError, ValueError) as error:
            raise DataError(
                f"{path} of the champion {revision} cannot be read: {type(error).__name__}: {error}",
                "`git fetch`, and `dvc fetch` or the credentials of the DVC remote; or pin another revision in gate.champion",
            ) from error

    try:
        entry = json.loads(read("models/evaluate/scores.json"))["tasks"].get(task)
        rows = [json.loads(line) for line in read(f"models/evaluate/samples/{task}.jsonl").split("\n") if line]
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"the results of the champion {revision} are damaged: {error!r}", "pin another revision in gate.champion") from error
    if not isinstance(entry, dict):
        raise DataError(f"the champion {revision} did not measure {task}", "pin another revision in gate.champion, or remove the rule")
    return entry, rows


def read_pairs(rows: Iterable[Mapping[str, JsonValue]], whose: str) -> Pairs:
    """Scores by question.

    Raises:
        DataError: a row has no score.
    """
    pairs: Pairs = {}
    for row in rows:
        score = number(row.get("score"))
        if score is None or "doc_hash" not in row or "phrasing" not in row:
            raise DataError(f"row {row.get('doc_hash')} of the {whose} has the score {row.get('score')!r}")
        pairs.setdefault((str(row["doc_hash"]), str(row["phrasing"])), []).append(score)
    return pairs


def join(champion: Pairs, candidate: Pairs) -> tuple[list[float], list[float]]:
    """Both models' scores per independent row: phrasings of a row share their luck, and are averaged.

    Raises:
        DataError: there are no rows, or they are not the same ones.
    """
    if not champion or not candidate:
        raise DataError("there are no samples to compare")
    counts = [{key: len(scores) for key, scores in of.items()} for of in (champion, candidate)]
    if counts[0] != counts[1]:
        strange = sorted(key for key in counts[0].keys() | counts[1].keys() if counts[0].get(key) != counts[1].get(key))
        raise DataError(
            f"champion and candidate were asked different questions: {len(strange)} of {len(counts[0].keys() | counts[1].keys())} "
            f"differ, as doc_hash {strange[0][0]} in phrasing {strange[0][1]}"
        )
    hashes = sorted({doc for doc, _ in candidate})
    means = []
    for of in (champion, candidate):
        rows: dict[str, list[float]] = {doc: [] for doc in hashes}
        for (doc, _), scores in sorted(of.items()):
            rows[doc] += scores
        means.append([math.fsum(scores) / len(scores) for scores in rows.values()])
    return means[0], means[1]


def weigh(rule: Relative, champion: tuple[Json, Pairs], candidate: tuple[Json, Pairs]) -> Comparison:
    """Compare one task's (entry of scores.json, rows).

    `mcnemar` is exact for one phrasing; means over several are no longer right or wrong, and the bootstrap takes its place.

    Raises:
        DataError: the rows cannot be compared, or not with this test.
    """
    from stages.statistics import compare

    for part in ("metric", "higher_is_better"):
        if champion[0].get(part) != candidate[0].get(part):
            raise DataError(f"the champion was measured with {part}={champion[0].get(part)!r}, the candidate with {candidate[0].get(part)!r}")
    old, new = join(champion[1], candidate[1])
    binary = all(score in (0, 1) for pairs in (champion[1], candidate[1]) for scores in pairs.values() for score in scores)
    if rule.test == "mcnemar" and not binary:
        raise DataError("a score is neither 0 nor 1: choose test: bootstrap")
    if candidate[0].get("higher_is_better") is not True:
        old, new = [1 - score for score in old], [1 - score for score in new]
    whole = all(score in (0, 1) for score in old + new)
    return compare(old, new, rule.margin, "exact" if rule.test == "mcnemar" and whole else "bootstrap")


def relate(rules: Mapping[str, Relative], alpha: float, weighed: Callable[[Relative], Comparison]) -> list[Json]:
    """Every relative rule with its outcome: promote (the loss is less than the margin), hold (more), or inconclusive; Holm over all."""
    from stages.statistics import holm

    entries: list[Json] = []
    done: list[tuple[Json, Relative, Comparison]] = []
    for name, rule in sorted(rules.items()):
        entry: Json = {"name": name, **asdict(rule), "outcome": "hold", "reason": ""}
        entries.append(entry)
        try:
            done.append((entry, rule, weighed(rule)))
        except DataError as error:
            entry["reason"] = f"{rule.task} cannot be compared: {error.what}{f' ({error.remedy})' if error.remedy else ''}"
    fine, bad = holm([c.p_not_worse for _, _, c in done], alpha), holm([c.p_worse for _, _, c in done], alpha)
    for (entry, rule, found), p_fine, p_bad in zip(done, fine, bad, strict=True):
        strictest = alpha / max(len(rules), 1)
        effect, needed = found.minimum_detectable_effect(strictest), found.rows_needed(strictest, rule.margin)
        outcome = "promote" if p_fine <= alpha else "hold" if p_bad <= alpha else "inconclusive"
        said = {
            "promote": "worse by less than the margin, if at all",
            "hold": "worse by more than the margin",
            "inconclusive": "too few rows to tell" + (f"; about {needed} would do for an equal model" if needed and needed > found.rows else ""),
        }[outcome]
        entry |= {
            "outcome": outcome,
            "method": found.method,
            "rows": found.rows,
            "better": found.better,
            "worse": found.worse,
            "difference": tidy(found.difference),
            "p_not_worse": tidy(p_fine),
            "p_worse": tidy(p_bad),
            "minimum_detectable_effect": tidy(effect),
            "rows_needed": needed,
            "reason": f"{rule.task}: {said} (difference {found.difference:+.4f}, margin {rule.margin:g}, {found.rows} rows, of which {found.worse} "
            f"worse and {found.better} better; p={p_fine:.3g} after Holm; minimum detectable effect {effect:.4f})",
        }
    return entries


def tidy(value: float) -> float:
    """Six significant digits: what differs beyond is the machine."""
    return float(f"{value:.6g}")
