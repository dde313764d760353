"""What a message quotes, apart from what its writer says in his own words.

A quotation is, wherever it begins first and without nesting:

    tag      <document> … </document>, and the other names of TAGS; without an end tag, to the end of the message
    fence    a fenced block of Markdown (``` or ~~~), with its fences; without an end, to the end of the message
    quote    lines that begin with >
    forward  what follows the head of a forwarded or answered mail ("-----Original Message-----", "On … wrote:", "From:" above "Subject:"),
             to the end of the message
    name     a whole message whose `name` is one of NAMES: so an application marks what it fetched

Markdown's parser knows two of the five, and takes 40 times as long; lines are enough here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

NAMES = frozenset({"document", "documents", "context", "tool", "retrieval"})
"""Values of a message's `name` that make it a quotation."""
TAGS = "documents|document|doc|context|source|sources|file|email|mail|web_?page|page|attachment|article|search_results?|tool_results?|tool_output|untrusted"
OPEN = re.compile(
    rf"<(?P<tag>{TAGS})(?:\s[^<>\n]{{0,300}})?>"
    r"|^[ ]{0,3}(?P<fence>`{3,}|~{3,})"
    r"|^[ ]{0,3}(?P<quote>>)"
    r"|^[ \t]*(?P<forward>-{2,}[ ]?(?:original|forwarded|weitergeleitete|urspr[uü]ngliche|message d'origine|mensaje)[^\n]{0,40}-{2,}"
    r"|begin forwarded message:|(?:on|am|le|el)\s[^\n]{4,200}\s(?:wrote|schrieb[^\n]{0,80}|a écrit|escribió)\s?:"
    r"|\*?(?:from|von|de):[^\n]*\n(?:[^\n]*\n){0,3}?\*?(?:sent|date|to|subject|gesendet|an|betreff|objet|asunto):)",
    re.IGNORECASE | re.MULTILINE,
)
LINE = re.compile(r"[ ]{0,3}>[^\n]*(?:\n|\Z)")


@dataclass(frozen=True, kw_only=True)
class Quotation:
    """`text[start:end]` of a message."""

    kind: str
    start: int
    end: int


def quotations(text: str) -> list[Quotation]:
    """What a message quotes, in order, without overlap; the time grows with the length of the text."""
    found: list[Quotation] = []
    at = 0
    while match := OPEN.search(text, at):
        kind = match.lastgroup or ""
        start, end = match.start(kind) - (kind == "tag"), len(text)
        if kind == "tag":
            closing = _closing(match["tag"].lower()).search(text, match.end())
            end = closing.end() if closing else end
        elif kind == "fence":
            closing = _fence(match["fence"]).search(text, match.end())
            end = closing.end() if closing else end
        elif kind == "quote":
            end = start
            while line := LINE.match(text, end):
                end = line.end()
                if end == len(text):
                    break
        found.append(Quotation(kind=kind, start=start, end=end))
        at = end
    return found


@lru_cache(maxsize=64)
def _closing(tag: str) -> re.Pattern[str]:
    return re.compile(rf"</{re.escape(tag)}\s{{0,9}}>", re.IGNORECASE)


@lru_cache(maxsize=64)
def _fence(opening: str) -> re.Pattern[str]:
    return re.compile(rf"^[ ]{{0,3}}{re.escape(opening[:3])}{re.escape(opening[0])}*[ \t]*$", re.MULTILINE)


def own_words(text: str, quoted: list[Quotation]) -> str:
    """The message without its quotations."""
    pieces, at = [], 0
    for quotation in quoted:
        pieces.append(text[at : quotation.start])
        at = quotation.end
    return "\n".join([*pieces, text[at:]]).strip()
