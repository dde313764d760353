"""The model card: Hugging Face's format, filled from what the stages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conf.schema import Package
from stages import platform


def model_card(
    settings: Package,
    *,
    digest: str,
    manifest: Mapping[str, Any],
    leaderboard: Mapping[str, Any],
    scores: Mapping[str, Any],
    redteam: Mapping[str, Any],
    guard: Mapping[str, Any],
    verdict: Mapping[str, Any],
    export: Mapping[str, Any],
    platforms: Mapping[str, platform.Platform],
) -> str:
    """MODEL_CARD.md: metadata for the hub, then data, scores, red-team, limits and digests for people.

    Args:
        digest: of the engine folder.
        manifest: data/collect/manifest.json.
        leaderboard: models/select/leaderboard.json.
        scores: models/evaluate/scores.json.
        redteam: models/redteam/result.json.
        guard: models/guard/result.json.
        verdict: models/gate/verdict.json.
        export: models/export/summary.json.
        platforms: stage -> where it computed.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    tasks: dict[str, Any] = dict(sorted(scores["tasks"].items()))
    base = next(row for row in leaderboard["candidates"] if row["candidate"] == leaderboard["chosen"])
    results = [
        EvalResult(task_type="text-generation", dataset_type=name, dataset_name=name, metric_type=task["metric"], metric_value=task["score"])
        for name, task in tasks.items()
        if task.get("score") is not None
    ]
    data = ModelCardData(
        model_name=settings.name,
        license="other" if settings.licence.startswith("LicenseRef-") else settings.licence.lower(),
        license_name=settings.licence if settings.licence.startswith("LicenseRef-") else None,
        library_name=export["engine"],
        pipeline_tag="text-generation",
        tags=["trunkline"],
        eval_results=results or None,
    )
    sections = {
        "": settings.description,
        "Intended use": settings.intended_use,
        "Limitations": settings.limitations,
        "Base": f"None of this repository's: {export['upstream']['model']}, as {export['upstream']['url']} runs it. No data below trained it."
        if export["engine"] == "upstream"
        else f"{base['candidate']}, {base['licence']}, {base['parameters']:,} parameters. {leaderboard['why']}",
        "Data": _table(
            ("data set", "used for", "licence", "classification", "rows", "source"),
            [(name, e["use"], e["licence"], e["classification"], e["rows"], e["address"]) for name, e in sorted(manifest.items())],
        ),
        "Scores": _table(
            ("task", "metric", "score", "standard error", "base", "gain", "rows"),
            [(name, t["metric"], *map(_number, (t["score"], t["stderr"], t.get("base", {}).get("score"), t.get("gain"))), t["n"]) for name, t in tasks.items()],
        ),
        "Attacks": _table(
            ("measure", "value"), [(key.replace("_", " "), _number(redteam.get(key))) for key in ("attack_success", "false_alarms", "canary_leaks")]
        ),
        "Guard": f"Refuses {_number(guard.get('recall'))} of the attacks of sources that it never saw, and {_number(guard.get('false_alarms'))} of ordinary "
        "messages.\n\n"
        + _table(
            ("attacks, or harmless messages", "refused", "95% interval", "texts"),
            [
                (name, _number(found["share"]), f"{_number(found['low'])} to {_number(found['high'])}", found["n"])
                for part in ("families", "benign")
                for name, found in guard.get(part, {}).items()
            ],
        ),
        "Gate": f"Outcome: {verdict['outcome']}.\n\n"
        + _table(
            ("rule", "metric", "must be", "limit", "measured", "kept"),
            [
                (r["name"], r["metric"], str(r["direction"]).replace("_", " "), _number(r["limit"]), _number(r["value"]), "yes" if r["passed"] else "no")
                for r in verdict.get("rules", [])
            ],
        ),
        "Export": "No weights: the model is asked over the network, and whoever runs it may change it. Personal data is masked before it leaves."
        if export["engine"] == "upstream"
        else f"{export['engine']}, {export['quantization']}, {export['parameters']:,} parameters. Agreement with the merged float32 model: "
        f"{_number(export['agreement'])} of {export['positions']} positions; largest difference of a log-probability: "
        f"{_number(export['max_logit_difference'])} nats.",
        "Made on": "\n\n".join(
            f"{', '.join(stages)}: {'; '.join(f'{key} {value}' for key, value in sorted(made_on.items()))}." for stages, made_on in platform.grouped(platforms)
        )
        or "Not recorded.",
        "Digests": f"engine sha256 `{digest}`. Every input's digest is in provenance.json.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {settings.name}\n\n{body}\n"))


def _number(value: object) -> str:
    """A number for people; a dash where there is none."""
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
