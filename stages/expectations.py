"""Great Expectations behind one function: frames and declared expectations in, plain outcomes and Data Docs out.

Whatever Great Expectations makes of a run, an outcome is one of two: it held, or it did not and says why. An exception
inside it, an unknown type, a wrong argument, or no result at all is a failure. Ids, times and paths of a run are removed.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from pydantic import JsonValue

from conf.schema import Expectation

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.data_context import EphemeralDataContext
    from great_expectations.expectations.expectation import Expectation as GxExpectation

KEYS = ["source", "id"]
"""Columns that name a row in an example."""
LONGEST = 200
"""Characters of a value, and entries of a list, that an outcome shows."""
HOUSEKEEPING = {
    "id",
    "meta",
    "notes",
    "result_format",
    "description",
    "catch_exceptions",
    "rendered_content",
    "windows",
    "batch_id",
    "severity",
    "condition_parser",
}
"""Fields of every expectation of Great Expectations that are no argument of the check."""
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""The run time that Data Docs show: an output may not hold the real one."""


class Outcome(TypedDict):
    """What became of one expectation."""

    success: bool
    reason: str
    """Why not; empty when it held."""
    observed: JsonValue
    """What was found instead, or beside."""
    examples: list[dict[str, JsonValue]]
    """Offending rows: source, id and value."""


def failure(reason: str, observed: JsonValue = None, examples: list[dict[str, JsonValue]] | None = None) -> Outcome:
    """An expectation that did not hold."""
    return Outcome(success=False, reason=reason, observed=observed, examples=examples or [])


def build(name: str, declared: Expectation) -> GxExpectation | str:
    """The object of Great Expectations, or what is wrong with its declaration."""
    from great_expectations.compatibility.pydantic import ValidationError
    from great_expectations.expectations.registry import get_expectation_impl, list_registered_expectation_implementations

    key = f"validate.expectations.{name}"
    known = list_registered_expectation_implementations()
    if declared.expect not in known:
        return f"{key}.expect: Great Expectations has no {declared.expect}{nearest(declared.expect, known)}"
    if not harmless(declared.kwargs.get("row_condition")):
        return f"{key}.kwargs.row_condition: a text is run as code; write a mapping: {{type: comparison, column: {{name: label}}, operator: ==, parameter: x}}"
    kind = get_expectation_impl(declared.expect)
    arguments = [field for field in kind.__fields__ if field not in HOUSEKEEPING]
    unknown = [f"{key}.kwargs.{word}: {declared.expect} has no such argument{nearest(word, arguments)}" for word in declared.kwargs if word not in arguments]
    if unknown:
        return "; ".join(unknown)
    try:
        return cast("GxExpectation", kind(**declared.kwargs, meta={"name": name}, notes=declared.why or None))
    except (ValidationError, ValueError, TypeError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        return "; ".join(f"{'.'.join([key, 'kwargs', *(str(part) for part in p['loc'] if part != '__root__')])}: {p['msg']}" for p in problems)


def harmless(condition: JsonValue) -> bool:
    """Whether a row condition only compares columns: as a text, Great Expectations would hand it to pandas to evaluate."""
    match condition:
        case None:
            return True
        case {"type": "comparison" | "nullity", "column": {"name": str(column)}}:
            return re.fullmatch(r"[\w.]+", column) is not None
        case {"type": "and" | "or", "conditions": [*conditions]}:
            return all(condition is not None and harmless(condition) for condition in conditions)
    return False


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean …?)`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f" (did you mean {close[0]}?)" if close else f" (it takes {', '.join(sorted(known))})"


def check(frames: Mapping[str, pd.DataFrame], declared: Mapping[str, Expectation], docs: Path, examples: int) -> dict[str, Outcome]:
    """Hold the frames against the expectations.

    Args:
        frames: what `Expectation.table` names; a frame that is empty fails all that is expected of it.
        declared: name -> expectation.
        docs: folder for the Data Docs.
        examples: offending rows per failure.
    """
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

    logging.getLogger("great_expectations").setLevel(logging.CRITICAL)  # every exception is in the results; its renderer only repeats them
    context = gx.get_context(mode="ephemeral", project_config=DataContextConfig(store_backend_defaults=InMemoryStoreBackendDefaults()))
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    context.add_data_docs_site(
        "docs",
        {"class_name": "SiteBuilder", "show_how_to_buttons": False, "store_backend": store, "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"}},
    )
    source = context.data_sources.add_pandas("preprocess")
    outcomes: dict[str, Outcome] = {}
    for table in dict.fromkeys(e.table for e in declared.values()):
        frame = frames[table]
        suite = gx.ExpectationSuite(name=table)
        for name in sorted(n for n, e in declared.items() if e.table == table):
            built = build(name, declared[name])
            if isinstance(built, str):
                outcomes[name] = failure(built)
            elif frame.empty:
                outcomes[name] = failure(f"{table} is empty: nothing could be checked", observed=0)
            else:
                outcomes[name] = failure("Great Expectations returned no result; does another name declare the same expectation?")
                suite.add_expectation(built)
        if frame.empty or not suite.expectations:
            continue
        batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("rows")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=table, data=batch, suite=context.suites.add(suite)))
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name=table,
                validation_definitions=[definition],
                result_format={
                    "result_format": "SUMMARY",
                    "partial_unexpected_count": max(examples, 1),
                    "unexpected_index_column_names": [k for k in KEYS if k in frame],
                },
            )
        )
        run = checkpoint.run(batch_parameters={"dataframe": frame}, run_id=RunIdentifier(run_name="validate", run_time=EPOCH))
        for results in run.run_results.values():
            for result in results.to_json_dict()["results"]:
                outcomes[result["expectation_config"]["meta"]["name"]] = judge(result, frame, examples)
    build_docs(context, docs)
    return dict(sorted(outcomes.items()))


def judge(result: dict[str, Any], frame: pd.DataFrame, examples: int) -> Outcome:
    """Reduce one result of Great Expectations to its outcome."""
    raised = [info["exception_message"] for info in flat(result["exception_info"]) if info.get("raised_exception")]
    if raised:
        return failure("Great Expectations raised: " + scrub("; ".join(dict.fromkeys(raised)), {}))
    found = result["result"]
    observed = plain({k: found[k] for k in ("unexpected_count", "element_count") if k in found} or None)
    if found.get("observed_value") is not None:
        observed = plain(found["observed_value"])
    elif missing := found.get("partial_missing_list"):
        observed = plain({"unexpected": found.get("partial_unexpected_list", []), "missing": missing})
    if result["success"] is True and (why := vacuous(found)):
        return failure(why, observed)
    if result["success"] is True:
        return Outcome(success=True, reason="", observed=observed, examples=[])
    kwargs = {k: v for k, v in result["expectation_config"]["kwargs"].items() if k != "batch_id"}
    rows = [
        plain({"source": r.pop("source", None), "id": r.pop("id", None), "value": r if len(r) != 1 else next(iter(r.values()))})
        for r in map(dict, found.get("partial_unexpected_index_list") or [])
    ]
    if not rows and kwargs.get("column") in frame:
        wrong = found.get("partial_unexpected_list") or [found.get("observed_value")]
        column = frame[kwargs["column"]]
        hit = frame[column.isin([w for w in wrong if isinstance(w, str | int | float)])].head(examples)
        rows = [plain({"source": row.get("source"), "id": row.get("id"), "value": row[kwargs["column"]]}) for _, row in hit.iterrows()]
    details = found.get("details", {}).get("mismatched")
    return failure(
        f"{result['expectation_config']['type']} does not hold{f': {details}' if details else ''}",
        observed,
        cast("list[dict[str, JsonValue]]", rows[:examples]),
    )


def vacuous(found: dict[str, Any]) -> str:
    """Why a result that Great Expectations counts as a success says nothing; empty when it does say something."""
    if found.get("element_count") == 0:
        return "no row was looked at"
    if found.get("element_count") is not None and found.get("element_count") == found.get("missing_count"):
        return "every value is missing: nothing was looked at"
    value = found.get("observed_value", 0)
    if (value is None and "unexpected_count" not in found) or (isinstance(value, float) and math.isnan(value)):
        return "there was no value to measure"
    return ""


def flat(info: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The exception records, whether there is one or one per metric."""
    if "raised_exception" in info:
        yield info
    else:
        yield from (value for value in info.values() if isinstance(value, dict))


def plain(value: object) -> JsonValue:
    """The value as short JSON: no NaN, no endless text or list."""
    match value:
        case bool() | None | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {str(k): plain(v) for k, v in value.items()}
        case list() | tuple() | set():
            items = [plain(v) for v in (sorted(value, key=str) if isinstance(value, set) else value)]
            return items if len(items) <= LONGEST else [*items[:LONGEST], f"… and {len(items) - LONGEST} more"]
    text = str(value.item() if hasattr(value, "item") else value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def build_docs(context: EphemeralDataContext, docs: Path) -> None:
    """Let Great Expectations write its site, then make its bytes a function of the data."""
    context.build_data_docs(["docs"])
    seen: dict[str, str] = {}
    for page in sorted(docs.rglob("*.html")):
        up = "../" * (len(page.relative_to(docs).parts) - 1) or "./"
        text = re.sub(
            r'https://great-expectations-web-assets[^"\']*?/([\w-]+\.png)(\?[^"\']*)?(?=["\'])',
            lambda m, up=up: f"{up}static/images/{m[1]}",  # type: ignore[misc]
            page.read_text(encoding="utf-8"),
        )
        page.write_text(scrub(text, seen), encoding="utf-8")


def scrub(text: str, seen: dict[str, str]) -> str:
    """Replace UUIDs (by their order of appearance, kept in `seen`), run times, addresses and installation paths."""
    text = re.sub(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", lambda m: seen.setdefault(m[0], f"00000000-0000-0000-0000-{len(seen):012d}"), text)
    text = re.sub(r"\b\d{8}T\d{6}\.\d{6}Z", EPOCH.strftime("%Y%m%dT%H%M%S.%fZ"), text)
    text = re.sub(r"\b0x[0-9a-f]{8,}\b", "0x0", text)
    return re.sub(r"(?<![\w.:/])/[^\s\"'<>&]*/(?=(?:site-packages|python3\.\d+)/)", "", text)
