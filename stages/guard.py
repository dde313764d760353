"""Train the guard's classifier on declared data, and measure it with the rules on texts that no training saw.

Reads:  data/collect/<datasets of guard.attacks and guard.benign>.jsonl, data/preprocess/train.jsonl and test.jsonl
Writes: models/guard/guard.json and weights.safetensors (what the service loads), samples.jsonl (every measured text with its verdict), result.json
Config: guard, serve.guard

Whole sources are unseen: none of their rows teaches, and a teaching text that repeats a measuring one is dropped. `recall` is over the attacks of
unseen sources, `false_alarms` over ordinary messages, rules and classifier together, as the service decides.
"""

from __future__ import annotations

import logging

import conf
from conf.schema import Guard, ServeGuard
from stages.files import publish, read_json
from stages.guard_learning import train
from stages.guard_measuring import OUT, measure
from stages.guard_texts import gather

log = logging.getLogger(__name__)


def main() -> None:
    """Gather, train, measure."""
    settings: Guard = conf.load("guard")
    serve: ServeGuard = conf.load("serve.guard")
    learnt, measured, repeats = gather(settings, serve)
    with publish(OUT) as folder:
        folder.mkdir(parents=True)
        train(learnt, settings, serve.window, folder)
        measure(folder, measured, serve, repeats)
        found = read_json(folder / "result.json")
    log.info("recall on unseen sources: %s; false alarms on ordinary messages: %s", found["recall"], found["false_alarms"])


if __name__ == "__main__":
    from stages.run import run

    run(main)
