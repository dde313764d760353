"""Hold the preprocessed rows against the expectations of conf/validate/, before anything is trained on them.

Reads:  data/preprocess/{train,validation,test}.jsonl, and corpus.jsonl when an expectation looks at it
Writes: data/validate/result.json, data/validate/docs/ (Data Docs); both also when the rows fail
Config: validate, preprocess.pii (which kinds of personal data count)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import conf
from conf.errors import DataError
from conf.schema import Expectation, Pii, Validate
from stages.expectations import Outcome, check
from stages.files import canonical, publish, remove, write_json
from stages.tables import build_tables

log = logging.getLogger(__name__)


def reasons(result: Mapping[str, Outcome], declared: Mapping[str, Expectation], rows: Mapping[str, int]) -> list[str]:
    """One sentence per failure, with what was found, why it matters, and example rows."""
    lines = ["train is empty: there is nothing to train on"] if not rows["train"] else []
    for name, outcome in result.items():
        if outcome["success"] is True:
            continue
        observed = "" if outcome["observed"] is None else f"; observed {canonical(outcome['observed'], indent=None).strip()}"
        examples = "".join(f"\n      {e['source']}/{e['id']}: {e['value']}" for e in outcome["examples"])
        why = f"\n    why: {declared[name].why}" if declared[name].why else ""
        lines.append(f"{name} (table {declared[name].table}): {outcome['reason']}{observed}{why}{examples}")
    return lines


def main() -> None:
    """Check, write the result, and stop the pipeline unless every expectation held."""
    settings: Validate = conf.load("validate")
    pii: Pii = conf.load("preprocess.pii")
    out = Path("data/validate")
    remove(out / "result.json")
    frames = build_tables(Path("data/preprocess"), list(settings.expectations.values()), pii)
    with publish(out / "docs") as docs:
        docs.mkdir()
        outcomes = check(frames, settings.expectations, docs, settings.examples)
    rows = {name: len(frame) for name, frame in frames.items()}
    failed = reasons(outcomes, settings.expectations, rows)
    write_json(
        out / "result.json",
        {
            "success": not failed,
            "rows": rows,
            "reasons": failed,
            "expectations": {name: asdict(settings.expectations[name]) | outcome for name, outcome in outcomes.items()},
        },
    )
    if failed:
        raise DataError(
            f"data/preprocess breaks {len(failed)} of {len(settings.expectations)} expectations\n  - " + "\n  - ".join(failed),
            "mend the source or conf/preprocess, or review the limit in conf/validate; data/validate/docs/index.html shows all",
        )
    log.info("%d expectations hold on %d rows", len(outcomes), rows["rows"])


if __name__ == "__main__":
    from stages.run import run

    run(main)
