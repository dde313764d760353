"""The guard as a whole: named rules and a classifier, and the verdict on a text.

The service loads the very folder that the pipeline trained and measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import ConfigError
from conf.schema import ServeGuard as Settings
from stages.serve.guard.classifier import Classifier
from stages.serve.guard.normalise import views


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard says of one text."""

    allowed: bool
    reasons: list[str] = field(default_factory=list)
    """Names of the rules that matched, and `classifier`."""
    score: float = 0.0
    """The classifier's worst window: 0 harmless, 1 an attack."""


class Guard:
    """Reads a message before the model does."""

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        """Args: folder: the classifier's; null: rules alone. settings: `serve.guard`.

        Raises:
            ConfigError: a rule is no regular expression.
            ModelError: the folder is incomplete or damaged.
        """
        self.settings = settings
        self.rules = {}
        for name, pattern in sorted(settings.rules.items()):
            try:
                self.rules[name] = re.compile(pattern, re.IGNORECASE)
            except re.error as error:
                raise ConfigError(f"serve.guard.rules.{name} is no regular expression: {error}: {pattern}", "mend the pattern") from error
        self.classifier = None if folder is None else Classifier(folder, settings.window)

    def check(self, text: str) -> Verdict:
        """Whether a message may reach the model, and why not."""
        if not self.settings.enabled:
            return Verdict(allowed=True)
        read = views(text)
        reasons = [name for name, rule in self.rules.items() if any(rule.search(view) for view in read)]
        score = self.classifier.score(text) if self.classifier else 0.0
        if self.classifier and score >= self.settings.threshold:
            reasons.append("classifier")
        return Verdict(allowed=not reasons, reasons=reasons, score=score)
