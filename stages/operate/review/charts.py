"""The figures of a review, as SVG that a page can recolour.

Drawn with Vega-Lite (as DVC's plots are), by altair, and rendered by vl-convert without a browser or a network. Colours are
placeholders, one for each role: the page's style sheet gives them their values, in light, in dark and in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.operate.review.changes import DataChange
from stages.operate.review.latency import Latency
from stages.operate.review.scores import ScoreChange
from stages.operate.review.snapshot import Snapshot

if TYPE_CHECKING:
    import altair

INK, MUTED, GRID, OLD, NEW = "#101112", "#707172", "#d0d1d2", "#909192", "#2060d3"
"""Placeholders: text, labels, lines of the grid, champion or base, candidate."""
WIDTH = 720
SIDES = ("champion", "candidate")
Rows = Sequence[Mapping[str, Any]]


def _svg(chart: Any) -> str:
    import vl_convert

    style = {"labelColor": MUTED, "titleColor": MUTED, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelLimit": 240}
    axis = style | {"gridColor": GRID, "domainColor": GRID, "tickColor": GRID, "tickCount": 8}
    dressed = chart.configure(background="transparent", font="sans-serif").configure_view(stroke=None).configure_axis(**axis).configure_legend(**style)
    return str(vl_convert.vegalite_to_svg(dressed.to_dict()))


def _colour(names: Sequence[str]) -> altair.Color:
    import altair as alt

    return alt.Color("side:N", scale=alt.Scale(domain=list(names), range=[OLD, NEW]), legend=alt.Legend(title=None, orient="top"))


def training(base: Snapshot, tree: Snapshot) -> str | None:
    """Loss over steps, training and validation, of the base's model and the candidate's; None: nothing was tuned."""
    import altair as alt

    rows = [
        {"side": name, "part": part, "step": int(step), "loss": float(loss)}
        for name, side in (("base", base), ("candidate", tree))
        for part in ("train", "validation")
        for step, loss in curve(side.text(f"models/tune/plots/metrics/{part}/loss.tsv"))
    ]
    if not rows:
        return None
    dash = alt.StrokeDash("part:N", scale=alt.Scale(domain=["train", "validation"], range=[[1, 0], [5, 3]]), legend=alt.Legend(title=None, orient="top"))
    lines = alt.Chart(alt.Data(values=rows)).mark_line(strokeWidth=1.8)
    return _svg(
        lines.encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False)),
            y=alt.Y("loss:Q", title="loss, nats per token", scale=alt.Scale(zero=False)),
            color=_colour(("base", "candidate")),
            strokeDash=dash,
        ).properties(width=WIDTH, height=200)
    )


def curve(text: str | None) -> list[tuple[str, str]]:
    """(step, value) of a TSV with a header."""
    return [(line.split("\t")[0], line.split("\t")[1]) for line in (text or "").splitlines()[1:] if "\t" in line]


def _intervals(rows: Rows, title: str, names: Sequence[str], domain: tuple[float, float] | None = None) -> str:
    """Points with intervals, one line for each `name`, one colour for each side."""
    import altair as alt

    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("name:N", title=None), yOffset=alt.YOffset("side:N", sort=list(names)), color=_colour(names))
    scale = alt.Scale(domain=list(domain)) if domain else alt.Scale(zero=False)
    marks = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title, scale=scale), x2="high:Q")
    points = base.mark_point(filled=True, size=60, opacity=1).encode(x="value:Q")
    return _svg((marks + points).properties(width=WIDTH, height=alt.Step(18)))


def scores(found: Sequence[ScoreChange]) -> str | None:
    """Score of each task with its 95% interval, the candidate's beside the champion's."""
    rows: list[dict[str, Any]] = []
    for task in found:
        for side, value, error in (("champion", task.champion, task.champion_error), ("candidate", task.candidate, task.candidate_error)):
            if value is not None:
                reach = 1.96 * (error or 0.0)
                rows.append({"name": task.task, "side": side, "value": value, "low": value - reach, "high": value + reach})
    unit = all(0 <= row["value"] <= 1 for row in rows)
    rows = [row | {"low": max(row["low"], 0), "high": min(row["high"], 1)} for row in rows] if unit else rows
    return _intervals(rows, "score, with 95% interval", SIDES, (0, 1) if unit else None) if rows else None


def differences(found: Sequence[ScoreChange]) -> str | None:
    """Difference of each task with its paired interval, around zero."""
    import altair as alt

    rows = [{"name": t.task, "value": t.difference, "low": t.low, "high": t.high} for t in found if t.difference is not None]
    if not rows:
        return None
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("name:N", title=None))
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="x:Q")
    reach = base.mark_rule(strokeWidth=2, color=NEW).encode(
        x=alt.X("low:Q", title="gain over the champion, paired 95% interval", scale=alt.Scale(padding=12)), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=60, color=NEW, opacity=1).encode(x="value:Q")
    return _svg((zero + reach + points).properties(width=WIDTH, height=alt.Step(26)))


def bars(pairs: Mapping[str, tuple[int, int]], title: str) -> str | None:
    """Counts before and after, by name; the largest first."""
    import altair as alt

    rows = [{"name": name, "side": side, "count": count} for name, both in pairs.items() for side, count in zip(("base", "candidate"), both, strict=True)]
    if not rows:
        return None
    order = sorted(pairs, key=lambda name: -max(pairs[name]))
    return _svg(
        alt.Chart(alt.Data(values=rows))
        .mark_bar(height={"band": 0.85})
        .encode(
            x=alt.X("count:Q", title=title),
            y=alt.Y("name:N", title=None, sort=order),
            yOffset=alt.YOffset("side:N", sort=["base", "candidate"]),
            color=_colour(("base", "candidate")),
        )
        .properties(width=WIDTH, height=alt.Step(9))
    )


def dropped(data: DataChange) -> str | None:
    """Rows that preprocess dropped, by reason."""
    return bars(data.dropped, "rows dropped")


def labels(data: DataChange) -> str | None:
    """Rows to train on, by label."""
    return bars(data.labels, "rows to train on") if len(data.labels) > 1 else None


def red_team(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str | None:
    """Attacks that got through, by family, and harmless messages refused, with their intervals."""
    rows = []
    for side, result in zip(SIDES, (before, after), strict=True):
        groups = {name: entry["success"] for name, entry in (result or {}).get("families", {}).items()}
        groups |= {f"refused: {name}": entry for name, entry in ((result or {}).get("benign") or {}).get("sources", {}).items()}
        rows += [{"name": name, "side": side, "value": entry["share"], "low": entry["low"], "high": entry["high"]} for name, entry in groups.items()]
    return _intervals(rows, "share that succeeded (attacks) or was refused (harmless), with 95% interval", SIDES, (0, 1)) if rows else None


def latency(found: Mapping[str, Latency]) -> str | None:
    """Each answer's time, and the median."""
    import altair as alt

    rows = [{"side": name, "ms": 1000 * second} for name, side in found.items() for second in side.seconds]
    if not rows:
        return None
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("side:N", title=None, sort=list(SIDES)), color=_colour(SIDES))
    ticks = base.mark_tick(thickness=2, height=14, opacity=0.6).encode(x=alt.X("ms:Q", title="milliseconds for an answer; the point is the median"))
    return _svg((ticks + base.mark_point(filled=True, size=70, opacity=1).encode(x="median(ms):Q")).properties(width=WIDTH, height=alt.Step(26)))
