"""Other tools for personal data on the same test set: `python tests/bench/pii_others.py samples.jsonl presidio|scrubadub`, in an environment of theirs.

It prints p50 and p95 for 2,000 characters, and a line per kind: recall under its kind, recall under any kind, precision. It imports
nothing of this repository but `tests.bench.pii`, for the measure. presidio runs its pattern recognisers on a blank spaCy pipeline, at its usual
threshold of 0.4; what they do not look for is no kind of theirs, and is left out.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tests.bench.pii import Finder, milliseconds, ordinary, rate
from tests.bench.pii_made import Sample

PRESIDIO = {"EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "IBAN_CODE": "iban", "CREDIT_CARD": "card", "IP_ADDRESS": "ip", "CRYPTO": "crypto",
            "US_SSN": "us_ssn", "UK_NHS": "uk_nhs", "URL": "url"}  # fmt: skip
SCRUBADUB = {"email": "email", "phone": "phone", "credit_card": "card", "url": "url", "social_security_number": "us_ssn"}


def presidio() -> Finder:
    """presidio-analyzer."""
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    class Blank(SpacyNlpEngine):
        def __init__(self) -> None:
            super().__init__(models=[{"lang_code": "en", "model_name": "blank"}])
            self.nlp = {"en": spacy.blank("en")}

    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=Blank(), supported_languages=["en"])

    def find(text: str) -> list[tuple[int, int, str]]:
        return [(r.start, r.end, PRESIDIO[r.entity_type]) for r in analyzer.analyze(text, "en", entities=list(PRESIDIO), score_threshold=0.4)]

    return find


def scrubadub() -> Finder:
    """scrubadub with the detectors that need no model."""
    import scrubadub as tool
    from scrubadub.detectors import CreditCardDetector, EmailDetector, PhoneDetector, UrlDetector
    from scrubadub.detectors.en_US import SocialSecurityNumberDetector

    made: list[Any] = [kind() for kind in (EmailDetector, PhoneDetector, CreditCardDetector, UrlDetector, SocialSecurityNumberDetector)]
    scrubber = tool.Scrubber(detector_list=made)

    def find(text: str) -> list[tuple[int, int, str]]:
        return [(f.beg, f.end, SCRUBADUB[f.type]) for f in scrubber.iter_filth(text) if f.type in SCRUBADUB]

    return find


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    given = [Sample(**json.loads(line)) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    tool, kinds = {"presidio": (presidio, PRESIDIO), "scrubadub": (scrubadub, SCRUBADUB)}[sys.argv[2]]
    finder = tool()
    for texts in (ordinary(given), given):
        sys.stdout.write("p50 {:.1f} ms, p95 {:.1f} ms\n".format(*milliseconds(finder, texts)))
    for kind, rated in rate([finder(sample.text) for sample in given], given).items():
        if kind in kinds.values():
            sys.stdout.write(f"{kind}: {rated['recall']:.3f} {rated['hidden']:.3f} {rated['precision']:.3f}\n")
