"""What the guard costs at run time, without the classifier: `python -m tests.bench guard_runtime`.

In: the shipped rules on messages of 2,000 characters. Out: the shipped settings on answers that come token by token, as the shipped model's tokenizer
cuts them: processor time of a look, and by how many tokens a piece, and the first one, comes later than without the guard.
Secrets: made keys of 21 kinds and harmless texts, Kingfisher beside detect-secrets where that is installed (it is no dependency).
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import pkgutil
import random
import statistics
import string
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import conf
from conf.schema import ServeGuard
from stages.records import read_records
from stages.serve.chat import Chat
from stages.serve.guard.guard import Guard
from stages.serve.guard.outgoing import Outgoing
from stages.serve.guard.secrets import scanner
from tests.bench.rows import Row, show

SIZE = 2000
"""Characters of a message."""
IN_BAR, OUT_BAR = 10.0, 1.0
"""Milliseconds: p95 of what comes in (all tiers together have 10), and the mean of a look at an answer."""
HELD_BAR = 2.0
"""Tokens by which a piece comes later, on average."""
PER_KIND = 20
ENGINE = Path("models/export/engine")
LETTERS, UPPER, LOWER, HEX = (
    string.ascii_letters + string.digits,
    string.ascii_uppercase + string.digits,
    string.ascii_lowercase + string.digits,
    "0123456789abcdef",
)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def took(work: Callable[[str], object], texts: Sequence[str]) -> list[float]:
    """Milliseconds of processor time for each text."""
    found = []
    for text in texts:
        began = time.thread_time()
        work(text)
        found.append((time.thread_time() - began) * 1e3)
    return found


def messages() -> list[str]:
    """Customers' words in messages of `SIZE` characters."""
    words = " ".join(record.text for record in read_records(Path("data/preprocess/train.jsonl")))
    return [words[at : at + SIZE] for at in range(0, len(words) - SIZE, SIZE)][:200]


def coming_in(settings: ServeGuard) -> Row:
    """The rules on what comes in."""
    guard = Guard(None, settings)
    took(guard.check, messages()[:3])
    found = took(guard.check, messages())
    p50, p95 = quantile(found, 0.5), quantile(found, 0.95)
    return Row(what=f"guard, in: {len(settings.rules)} rules on {SIZE:,} characters, p50 and p95", ours=f"{p50:.2f} ms; {p95:.2f} ms", theirs="", ratio=float("nan"),
               bar=f"p95 at most {IN_BAR:g} ms", met=p95 <= IN_BAR)  # fmt: skip


def going_out(settings: ServeGuard, system: str) -> list[Row]:
    """Answers in tokens."""
    chat, outgoing = Chat(ENGINE), Outgoing(settings)
    answers = [record.completion or record.text for record in read_records(Path("data/preprocess/train.jsonl"))][:200]
    looks, late, first = [], [], []
    for answer in answers:
        watch, given = outgoing.watch(system, ""), []
        tokens = chat.encode(answer)
        pieces = [chat.decode(tokens[: i + 1])[len(chat.decode(tokens[:i])) :] for i in range(len(tokens))]
        ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
        for piece in pieces:
            began = time.thread_time()
            watch.push(piece)
            looks.append((time.thread_time() - began) * 1e3)
            given.append(watch.settled)
        given.append(ends[-1])  # the end lets go of the rest
        waits = [next(j for j, settled in enumerate(given) if settled >= end) - i for i, end in enumerate(ends)]
        late += [min(wait, len(pieces) - 1 - i) for i, wait in enumerate(waits)]
        first.append(next(j for j, settled in enumerate(given) if settled > 0))
    mean, worst = statistics.mean(looks), quantile(looks, 0.99)
    return [
        Row(what="guard, out: a look at each token of an answer, mean and p99", ours=f"{mean:.3f} ms; {worst:.3f} ms", theirs="", ratio=float("nan"),
            bar=f"mean at most {OUT_BAR:g} ms", met=mean <= OUT_BAR),
        Row(what="guard, out: tokens by which a token comes later, mean and p95; the first text of an answer, mean",
            ours=f"{statistics.mean(late):.2f}; {quantile(late, 0.95):.0f}; {statistics.mean(first):.2f}", theirs="", ratio=float("nan"),
            bar=f"mean at most {HELD_BAR:g}", met=statistics.mean(late) <= HELD_BAR),
    ]  # fmt: skip


def keys(draw: random.Random) -> dict[str, Callable[[], str]]:
    """Makers of keys by kind, in the forms that their issuers document."""

    def r(alphabet: str, size: int) -> str:
        return "".join(draw.choices(alphabet, k=size))

    def coded(value: dict[str, str]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    private = "RSA PRIVATE " + "KEY-----"
    return {
        "aws": lambda: "AKIA" + r(string.ascii_uppercase + "234567", 16), "github": lambda: "ghp_" + r(LETTERS, 36),
        "github-fine": lambda: f"github_pat_{r(LETTERS, 22)}_{r(LETTERS, 59)}", "gitlab": lambda: "glpat-" + r(LETTERS, 20),
        "slack": lambda: f"xoxb-{r(string.digits, 12)}-{r(string.digits, 12)}-{r(LETTERS, 24)}",
        "slack-hook": lambda: f"https://hooks.slack.com/services/T{r(UPPER, 8)}/B{r(UPPER, 8)}/{r(LETTERS, 24)}", "stripe": lambda: "sk_live_" + r(LETTERS, 24),
        "google": lambda: "AIza" + r(LETTERS + "-_", 35), "openai": lambda: f"sk-proj-{r(LETTERS, 58)}T3BlbkFJ{r(LETTERS, 58)}",
        "openai-old": lambda: f"sk-{r(LETTERS, 20)}T3BlbkFJ{r(LETTERS, 20)}", "anthropic": lambda: f"sk-ant-api03-{r(LETTERS + '-_', 93)}AA",
        "huggingface": lambda: "hf_" + r(string.ascii_letters, 34), "npm": lambda: "npm_" + r(LETTERS, 36),
        "pypi": lambda: "pypi-AgEIcHlwaS5vcmc" + r(LETTERS + "-_", 80), "sendgrid": lambda: f"SG.{r(LETTERS, 22)}.{r(LETTERS, 43)}",
        "twilio": lambda: "SK" + r(HEX, 32), "telegram": lambda: f"{r('123456789', 9)}:AA{r(LETTERS, 33)}",
        "azure": lambda: f"DefaultEndpointsProtocol=https;AccountName=desk;AccountKey={r(LETTERS + '+/', 86)}==",
        "jwt": lambda: f"{coded({'alg': 'HS256', 'typ': 'JWT'})}.{coded({'sub': r(string.digits, 10), 'name': 'Jo'})}.{r(LETTERS + '-_', 43)}",
        "basic-auth": lambda: f"https://{r(LOWER, 6)}:{r(LETTERS, 14)}@db.example.com/x",
        "private-key": lambda: "-----BEGIN " + private + "\n" + "\n".join(r(LETTERS + "+/", 64) for _ in range(12)) + "\n-----END " + private,
    }  # fmt: skip


def harmless(draw: random.Random, texts: Sequence[str]) -> list[str]:
    """What looks like a key and is none, and ordinary words."""
    found = list(texts[:300])
    for _ in range(300):
        found += [
            f"Order {''.join(draw.choices(UPPER, k=8))} was sent with tracking 1Z{''.join(draw.choices(UPPER, k=16))}.",
            f"The commit is {hashlib.sha1(draw.randbytes(9)).hexdigest()}.", f"sha256 {hashlib.sha256(draw.randbytes(9)).hexdigest()}",
            f"Your ticket {uuid.UUID(int=draw.getrandbits(128))} is open.", f"Serial {'-'.join(''.join(draw.choices(UPPER, k=5)) for _ in range(3))}.",
            f"See https://shop.example.com/p/{''.join(draw.choices(LOWER, k=12))}?ref={''.join(draw.choices(LETTERS, k=10))} for the tent.",
            f"The text is {base64.b64encode(draw.choice(texts).encode()).decode()[:60]}.",
        ]  # fmt: skip
    return found


def detect_secrets() -> Callable[[str], bool] | None:
    """The patterns of detect-secrets; null: it is not installed."""
    try:
        plugins = importlib.import_module("detect_secrets.plugins")
    except ImportError:
        return None
    patterns = {}
    for found in pkgutil.iter_modules(plugins.__path__):
        for name, plugin in vars(importlib.import_module(f"detect_secrets.plugins.{found.name}")).items():
            if (
                isinstance(plugin, type)
                and isinstance(listed := getattr(plugin, "denylist", None), list | tuple)
                and name not in ("IPPublicDetector", "KeywordDetector")
            ):
                patterns[name] = list(listed)
    return lambda text: any(pattern.search(text) for listed in patterns.values() for pattern in listed)


def secrets() -> Row:
    """Who finds which keys."""
    draw, texts = random.Random(7), messages()
    made = {kind: [f"Sure. Your key is {make()} and it is valid." for _ in range(PER_KIND)] for kind, make in keys(draw).items()}
    good = harmless(draw, texts)

    def told(find: Callable[[str], bool]) -> tuple[int, str]:
        kinds = [kind for kind, rows in made.items() if sum(map(find, rows)) >= 0.9 * PER_KIND]
        missed = ", ".join(sorted(set(made) - set(kinds)))
        took(lambda text: find(text), texts[:5])
        spent = took(lambda text: find(text), texts)
        return len(kinds), (f"{len(kinds)} of {len(made)} kinds (not {missed}), {sum(map(find, good))} of {len(good)} false, {quantile(spent, 0.5):.3f} ms; "
                            f"{quantile(spent, 0.95):.3f} ms")  # fmt: skip

    ours, shown = told(lambda text: any(finding.visible for finding in scanner().scan(text)))
    other = detect_secrets()
    theirs, beside = told(other) if other else (0, "detect-secrets is not installed")
    return Row(what=f"guard, out: secrets by Kingfisher against detect-secrets; p50 and p95 for {SIZE:,} characters", ours=shown, theirs=beside,
               ratio=ours / theirs if theirs else float("nan"), bar="not fewer kinds", met=ours >= theirs)  # fmt: skip


def rows() -> list[Row]:
    """All of it, with the settings in params.yaml."""
    settings: ServeGuard = conf.load("serve.guard")
    system: str | None = conf.load("serve.system")
    return [coming_in(settings), *going_out(settings, system or ""), secrets()]


if __name__ == "__main__":
    show(rows())
    sys.exit(0)
