"""The declared rules on what comes in: named patterns on the normalised text, their exceptions, and masking.

An exception (`allow`) outweighs another rule's match only where that match lies wholly inside the exception's own, so that a harmless phrase beside an
attack excuses nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence

from conf.errors import ConfigError
from conf.patterns import compile_pattern
from conf.schema import Action, Direction, ServeGuard
from stages.serve.guard.folded import Folded
from stages.serve.guard.normalise import normalise, plain

LETTER = r"\pL\pN"
WITHOUT_BLANKS = re.compile("[\u0e00-\u0eff\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]")
"""A letter of a script that writes words without blanks between them: Thai, Lao, Khmer, Chinese, Japanese."""
TOKEN = re.compile(r"\\[pPx]\{[^}]*\}|\\.|\[\^?\]?(?:\[:[^\]]*:\]|\\.|[^\]\\])*\]|.", re.DOTALL)
"""An escape, a class or a character of a pattern."""
ROUNDS = 4
"""Most times that a text is masked: what is left may match anew."""


class Rule:
    """A pattern under a name; a topic has one for each of its words and patterns."""

    def __init__(self, name: str, action: Action, source: str, word: bool = False) -> None:
        """Args: source: the pattern as written, or with `word` a word or phrase of any script, which is found whole.

        Raises:
            ConfigError: it is no pattern.
        """
        self.name, self.action, self.source = name, action, source
        alone, self._body = whole(source) if word else (False, spelt(source))
        self.plainly = not word and not (source.isascii() and "\\p" not in source.lower())
        """Whether it may speak of a script, and is looked for in the text with look-alikes left in theirs too."""
        edge = f"[^{LETTER}]"  # RE2 has no look-around: the neighbours are matched too, and the group is what counts
        try:
            self._pattern = compile_pattern(f"(?:^|{edge})({self._body})(?:$|{edge})" if alone else self._body)
        except ValueError as error:
            raise ConfigError(f"serve.guard: {name}: {error}", "mend the pattern") from error
        self.lookaround = scoped(f"(?<![{LETTER}])(?:{self._body})(?![{LETTER}])" if alone else f"(?:{self._body})")
        """The same pattern for the package `regex`."""
        self._group = 1 if alone else 0

    def matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Where it matches a normalised text, without overlap, empty matches left out."""
        yield from (span for match in self._pattern.finditer(text) if (span := match.span(self._group))[0] < span[1])

    @property
    def mask(self) -> str:
        """What stands in the place of a match."""
        return placeholder(self.name)


def placeholder(name: str) -> str:
    """What is read in the place of a find of this name."""
    return "<TOPIC>" if name.startswith("topic:") else f"<{name.upper()}>"


def declared(settings: ServeGuard, direction: Direction) -> list[Rule]:
    """The rules and topics for one direction, by name.

    Raises:
        ConfigError: a rule masks with a text that it matches itself.
    """
    found = [Rule(name, rule.action, rule.pattern) for name, rule in sorted(settings.rules.items()) if rule.direction in (direction, "both")]
    for name, topic in sorted(settings.topics.items()):
        if topic.direction in (direction, "both"):
            found += [Rule(f"topic:{name}", topic.action, word, word=True) for word in topic.words]
            found += [Rule(f"topic:{name}", topic.action, pattern) for pattern in topic.patterns]
    for rule in found:
        if rule.action == "mask" and any(True for _ in rule.matches(Folded(rule.mask).text)):
            raise ConfigError(f"serve.guard: {rule.name} masks with {rule.mask}, which it matches itself: {rule.source}", "give it another name")
    return found


def whole(word: str) -> tuple[bool, str]:
    """Whether a word or phrase must stand alone, as it does in scripts with blanks between words, and its pattern."""
    import re2

    found = {Folded(word.strip()).text, normalise(word), plain(word)}  # an answer is read letter by letter, a request word by word
    return not any(map(WITHOUT_BLANKS.search, found)), "|".join(r"\s".join(map(re2.escape, form.split(" "))) for form in sorted(found))


def spelt(pattern: str) -> str:
    """The pattern with each letter beyond ASCII as it stands in a normalised text: in lower case, without accents, or as the Latin letter it looks like."""

    def one(found: re.Match[str]) -> str:
        token = found[0]
        if token.isascii() or not token.isalpha():
            return token if token.isascii() or "\\" in token else token.lower()
        forms = dict.fromkeys(form for form in (plain(token), normalise(token)) if form)
        return f"(?:{'|'.join(forms)})" if forms else token

    return TOKEN.sub(one, unicodedata.normalize("NFC", pattern))


def scoped(pattern: str) -> str:
    """The pattern for `regex` under its flag ASCII, by which `\\w` is RE2's: what speaks of other scripts is read without that flag."""

    def one(found: re.Match[str]) -> str:
        token = found[0]
        return f"(?u:{token})" if "\\p" in token.lower() or (token[0] == "[" and not token.isascii()) else token

    return TOKEN.sub(one, pattern)


class Rules:
    """What is declared for one direction."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Args: rules: as of `declared`."""
        self._allowing = [rule for rule in rules if rule.action == "allow"]
        self.rules = [rule for rule in rules if rule.action != "allow"]
        self.plainly = any(rule.plainly for rule in rules)
        """Whether a text is read with look-alikes in their own script, too."""

    def excused(self, text: str) -> list[tuple[int, int]]:
        """What the exceptions match in a normalised text."""
        return sorted(span for rule in self._allowing for span in rule.matches(text))

    def without_excused(self, text: str) -> str:
        """The text as it came, with blanks for what the exceptions match: a payload that is left stays as it was written, or it could not be decoded."""
        if not self._allowing or (text.isascii() and not self.excused(normalise(text))):
            return text
        folded = Folded(text)
        return overwrite(text, [(*folded.span(*span), " ") for span in self.excused(folded.text)])

    @staticmethod
    def found(rule: Rule, text: str, excused: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The matches of a rule that count."""
        yield from (s for s in rule.matches(text) if not any(start <= s[0] and s[1] <= end for start, end in excused))

    def mask(self, text: str, rules: Collection[Rule]) -> str | None:
        """The text as it came, with the matches of these rules written over; null where one still matches after `ROUNDS`."""
        for _ in range(ROUNDS):
            spans = []
            for folded in (Folded(text), Folded(text, plainly=True)) if self.plainly else (Folded(text),):
                excused = self.excused(folded.text)
                spans += [(*folded.span(*span), rule.mask) for rule in rules for span in self.found(rule, folded.text, excused)]
            spans.sort()
            if not spans:
                return text
            text = overwrite(text, spans)
        return None


def overwrite(text: str, spans: Sequence[tuple[int, int, str]]) -> str:
    """The text with other words in the place of spans, which are sorted and may overlap: the first of several counts for all."""
    pieces, at = [], 0
    for start, end, word in spans:
        if start >= at:
            pieces += [text[at:start], word]
        at = max(at, end)
    return "".join([*pieces, text[at:]])
