"""The champion's rows beside the candidate's: had from git and DVC at its revision, joined, refused when they differ, compared."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pydantic import JsonValue

from conf.errors import DataError
from conf.schema import Relative
from stages.intact import forget_index

if TYPE_CHECKING:
    from stages.statistics import Comparison

Json = dict[str, JsonValue]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One model's half of the pairs."""

    scores: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(doc_hash, phrasing) -> scores; more than one where a row occurs more than once."""
    groups: dict[str, str] = field(default_factory=dict)
    """doc_hash -> what the row shares with others of its group; empty: it stands alone."""


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

    @functools.cache
    def files() -> DVCFileSystem:
        made = DVCFileSystem(".", rev=revision)
        forget_index(made.repo)
        return made

    def read(path: str) -> str:
        try:
            return str(files().read_text(path, encoding="utf-8"))
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
    """Scores by question, and groups.

    Raises:
        DataError: a row has no score, or is of two groups.
    """
    pairs = Pairs()
    for row in rows:
        score = number(row.get("score"))
        if score is None or "doc_hash" not in row or "phrasing" not in row:
            raise DataError(f"row {row.get('doc_hash')} of the {whose} has the score {row.get('score')!r}")
        doc, group = str(row["doc_hash"]), str(row.get("group") or "")
        pairs.scores.setdefault((doc, str(row["phrasing"])), []).append(score)
        if pairs.groups.setdefault(doc, group) != group:
            raise DataError(f"row {doc} of the {whose} is of two groups: {pairs.groups[doc]!r} and {group!r}")
    return pairs


def join(champion: Pairs, candidate: Pairs) -> tuple[list[float], list[float], list[tuple[str, str]]]:
    """Both models' scores per row, for phrasings of a row share their luck and are averaged; and its group, a row's own where it has none.

    Raises:
        DataError: there are no rows, or they are not the same ones in the same groups.
    """
    if not champion.scores or not candidate.scores:
        raise DataError("there are no samples to compare")
    counts = [{key: len(scores) for key, scores in of.scores.items()} for of in (champion, candidate)]
    if counts[0] != counts[1]:
        strange = sorted(key for key in counts[0].keys() | counts[1].keys() if counts[0].get(key) != counts[1].get(key))
        raise DataError(
            f"champion and candidate were asked different questions: {len(strange)} of {len(counts[0].keys() | counts[1].keys())} "
            f"differ, as doc_hash {strange[0][0]} in phrasing {strange[0][1]}"
        )
    hashes = sorted(candidate.groups)
    if moved := [doc for doc in hashes if champion.groups[doc] != candidate.groups[doc]]:
        raise DataError(
            f"champion and candidate are grouped differently: {len(moved)} of {len(hashes)} rows, as doc_hash {moved[0]}, "
            f"in {champion.groups[moved[0]]!r} and in {candidate.groups[moved[0]]!r}",
            "evaluate the champion with the task's group_by, commit its results, and pin that commit in gate.champion",
        )
    means = []
    for of in (champion, candidate):
        rows: dict[str, list[float]] = {doc: [] for doc in hashes}
        for (doc, _), scores in sorted(of.scores.items()):
            rows[doc] += scores
        means.append([math.fsum(scores) / len(scores) for scores in rows.values()])
    return means[0], means[1], [(group, "" if group else doc) for doc in hashes for group in (candidate.groups[doc],)]


def weigh(rule: Relative, champion: tuple[Json, Pairs], candidate: tuple[Json, Pairs]) -> Comparison:
    """Compare one task's (entry of scores.json, rows).

    `mcnemar` is exact for one phrasing of rows that stand alone; means over several are no longer right or wrong, and rows of a group
    fall together: the bootstrap takes its place.

    Raises:
        DataError: the rows cannot be compared, or not with this test.
    """
    from stages.statistics import compare

    for part in ("metric", "higher_is_better"):
        if champion[0].get(part) != candidate[0].get(part):
            raise DataError(f"the champion was measured with {part}={champion[0].get(part)!r}, the candidate with {candidate[0].get(part)!r}")
    old, new, groups = join(champion[1], candidate[1])
    binary = all(score in (0, 1) for pairs in (champion[1], candidate[1]) for scores in pairs.scores.values() for score in scores)
    if rule.test == "mcnemar" and not binary:
        raise DataError("a score is neither 0 nor 1: choose test: bootstrap")
    if candidate[0].get("higher_is_better") is not True:
        old, new = [1 - score for score in old], [1 - score for score in new]
    whole = all(score in (0, 1) for score in old + new)
    return compare(old, new, rule.margin, "exact" if rule.test == "mcnemar" and whole else "bootstrap", groups)


def relate(rules: Mapping[str, Relative], alpha: float, weighed: Callable[[Relative], Comparison]) -> list[Json]:
    """Every relative rule with its outcome: promote (the loss is less than the margin), hold (more), or inconclusive; Holm over all.

    `low` and `high` bound the true difference with the confidence 1 - 2 alpha, each rule for itself, before Holm's correction. What is
    promoted has a `low` above a loss of the margin, what is held a `high` below it; not the other way round, where there are several rules.
    The minimum detectable effect and the rows needed are those at Holm's strictest level, alpha over the number of rules.
    """
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
    strictest = alpha / max(len(rules), 1)
    for (entry, rule, found), p_fine, p_bad in zip(done, fine, bad, strict=True):
        effect, needed, needed_as_seen = (
            found.minimum_detectable_effect(strictest),
            found.rows_needed(strictest),
            found.rows_needed(strictest, found.difference),
        )
        low, high = found.interval(alpha)
        outcome = "promote" if p_fine <= alpha else "hold" if p_bad <= alpha else "inconclusive"
        said = {
            "promote": "worse by less than the margin, if at all",
            "hold": "worse by more than the margin",
            "inconclusive": "too few rows to tell" + would_do(found.rows, needed, needed_as_seen),
        }[outcome]
        entry |= {
            "outcome": outcome,
            "method": found.method,
            "rows": found.rows,
            "groups": found.groups,
            "design_effect": tidy(found.design_effect),
            "better": found.better,
            "worse": found.worse,
            "difference": tidy(found.difference),
            "low": tidy(low),
            "high": tidy(high),
            "confidence": tidy(1 - 2 * alpha),
            "p_not_worse": tidy(p_fine),
            "p_worse": tidy(p_bad),
            "minimum_detectable_effect": None if effect is None else tidy(effect),
            "rows_needed": needed,
            "rows_needed_as_seen": needed_as_seen,
            "reason": f"{rule.task}: {said} (difference {found.difference:+.4f}, {1 - 2 * alpha:.0%} interval {low:+.4f} to {high:+.4f}, "
            f"margin {rule.margin:g}, {found.rows} rows{f' in {found.groups} groups' if found.groups else ''}, of which {found.worse} worse and "
            f"{found.better} better; p={p_fine:.3g} after Holm; minimum detectable effect {'none' if effect is None else f'{effect:.4f}'})",
        }
    return entries


def would_do(rows: int, equal: int | None, as_seen: int | None) -> str:
    """How many rows would settle what so many did not."""
    for_equal = f"about {equal} would do for an equal model" if equal and equal > rows else "" if equal else "no number would do for an equal model"
    seen = (
        f"about {as_seen} if the true difference is the one seen" if as_seen else "no number if the true difference is the one seen: it is too near the margin"
    )
    return "".join(f"; {part}" for part in (for_equal, seen) if part)


def tidy(value: float) -> float:
    """Six significant digits: what differs beyond is the machine."""
    return float(f"{value:.6g}")
