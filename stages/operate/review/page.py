"""A review as Markdown, for a pull request's comment, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import html as escaping
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.operate.review import charts
from stages.operate.review.snapshot import Snapshot

if TYPE_CHECKING:
    import jinja2

    from stages.operate.review.command import Review

LONGEST = 60_000
"""Characters of the Markdown: GitHub takes 65,536 in a comment."""
CELL = 90
"""Characters of a value in a table."""


def markdown(found: Review) -> str:
    """The comment; its first line marks it, so that it is found again and updated in place."""
    text = _environment(autoescape=False).get_template("review.md.jinja").render(found=found, **_parts(found))
    if len(text) <= LONGEST:
        return text
    return text[:LONGEST].rsplit("\n", 1)[0] + "\n\n…\n\nThe rest is in review.html, among the files of this run.\n"


def html(found: Review, base: Snapshot, tree: Snapshot) -> str:
    """The page."""
    figures = {
        "training": found.attempt(lambda: charts.training(base, tree)),
        "scores": charts.scores(found.scores),
        "differences": charts.differences(found.scores),
        "dropped": charts.dropped(found.data) if found.data else None,
        "labels": charts.labels(found.data) if found.data else None,
        "red_team": charts.red_team(found.attacks, found.judged.attacks) if found.judged else None,
        "latency": charts.latency(found.latency),
    }
    return _environment(autoescape=True).get_template("review.html.jinja").render(found=found, figures=figures, roles=_roles(), **_parts(found))


def _environment(autoescape: bool) -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"value": value, "size": size, "number": number, "signed": signed, "cell": cell, "fenced": fenced, "duration": duration}
    return environment


def _roles() -> dict[str, str]:
    """Placeholder colour of the charts -> the style sheet's name for it."""
    return {charts.INK: "ink", charts.MUTED: "muted", charts.GRID: "line", charts.OLD: "old", charts.NEW: "new"}


def _parts(found: Review) -> dict[str, Any]:
    """What both forms show, worked out."""
    verdict: Mapping[str, Any] = found.judged.verdict if found.judged else {"rules": []}
    return {
        "verdict": verdict,
        "failed": [rule for rule in verdict.get("rules", []) if rule.get("passed") is not True],
        "signs": {"at_least": "≥", "at_most": "≤"},
        "moved_stages": [stage for stage in found.stages if stage.effect != "unchanged"],
        "still": [stage.stage for stage in found.stages if stage.effect == "unchanged"],
        "moved_sources": [s for s in found.data.sources if s.changed or s.rows != s.rows_before] if found.data else [],
    }


def value(item: object) -> str:
    """A configuration value, short."""
    shown = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return shown if len(shown) <= CELL else f"{shown[: CELL - 1]}…"


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**19 else f"{count / 2**10:,.0f} KiB"


def number(item: float | None) -> str:
    """A score."""
    return "-" if item is None else f"{item:.3f}"


def signed(item: float | None) -> str:
    """A difference."""
    return "-" if item is None else f"{item:+.3f}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def cell(text: object) -> str:
    """Text for a cell of a Markdown table: one line, nothing of it markup."""
    flat = " ".join(str(text).split())
    return escaping.escape(flat, quote=False).replace("|", "\\|").replace("`", "&#96;").replace("@", "@\u200b").replace("*", "\\*").replace("_", "\\_")


def fenced(text: str, language: str = "text", longest: int = 600) -> str:
    """Text as a block of code, whose fence is longer than any within it."""
    cut = text if len(text) <= longest else f"{text[:longest]}…"
    fence = "```"
    while fence in cut:
        fence += "`"
    return f"{fence}{language}\n{cut}\n{fence}"
