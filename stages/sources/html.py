"""Rows of a web page: elements by CSS selector, and their texts as a reader sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from conf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bs4 import Tag

BLOCKS = [
    "address",
    "article",
    "blockquote",
    "br",
    "dd",
    "div",
    "dl",
    "dt",
    "figcaption",
    "footer",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "header",
    "hr",
    "li",
    "main",
    "nav",
    "ol",
    "p",
    "pre",
    "section",
    "table",
    "td",
    "th",
    "tr",
    "ul",
]
DEEPEST = 1000
"""Elements within each other; a page of unclosed <p> reaches hundreds, a browser stops at 512."""
UNSEEN = ["script", "style", "template", "noscript", "head"]


def seen_text(element: Tag) -> str:
    """The element's text: a line per block, blanks collapsed, without scripts and styles."""
    lines = (" ".join(line.split()) for line in element.get_text().split("\n"))
    return "\n".join(line for line in lines if line)


def value(element: Tag, selector: str) -> str:
    """Text of the first element that matches, or its attribute (`selector@attribute`, `@attribute`: the row's own); none: empty."""
    path, _, attribute = selector.partition("@")
    found = element.select_one(path) if path.strip() else element
    if found is None:
        return ""
    if not attribute:
        return seen_text(found)
    held = found.get(attribute) or ""
    return held if isinstance(held, str) else " ".join(held)


def html_rows(name: str, page: str, rows_at: str | None, fields: dict[str, str]) -> Iterator[dict[str, object]]:
    """Yield one row per element of `rows_at` (null: the page), with the values of the fields' selectors, or its whole text.

    Raises:
        ConfigError: a selector is no CSS.
        DataError: elements are nested without end.
    """
    from bs4 import BeautifulSoup
    from soupsieve import SelectorSyntaxError

    class Page(BeautifulSoup):
        """Refuses what would not end: the work on a page grows with the square of its depth."""

        def pushTag(self, tag: Tag) -> None:
            """Open an element."""
            if len(self.tagStack) > DEEPEST:
                raise DataError(
                    f"{name}: elements nested more than {DEEPEST} deep, the last is <{tag.name}>", "this is no page for people: mend it, or leave it out"
                )
            super().pushTag(tag)

    soup = Page(page, "html.parser")
    title = soup.title.get_text(strip=True) if soup.title else ""
    for element in soup.find_all(UNSEEN):
        element.decompose()
    for text in soup.find_all(string=True):
        if "\n" in text and not text.find_parent("pre"):
            text.replace_with(type(text)(text.replace("\n", " ")))  # a line break in the source is a blank to a reader
    for block in soup.find_all(BLOCKS):
        block.insert_before("\n")
        block.append("\n")
    try:
        for element in soup.select(rows_at) if rows_at else [soup]:
            yield {"text": seen_text(element), **{field: value(element, selector) for field, selector in fields.items()}, "title": title}
    except SelectorSyntaxError as error:
        raise ConfigError(f"{name}: a selector of `rows_at` or `fields` is no CSS: {str(error).splitlines()[0]}", "correct the selector") from error
