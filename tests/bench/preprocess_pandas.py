"""Preprocess as a script of pandas and datasketch: `python -m tests.bench.preprocess_pandas`, in a folder with data/collect.

The whole corpus is in memory, as one writes it at first. The words of a text are datatrove's `simplify_text`, split at blanks.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from datasketch import MinHash, MinHashLSH
from datatrove.utils.text import simplify_text

from tests.bench.preprocess_cleaning import BUCKETS, DECONTAMINATE, HASHES, MAX_CHARS, NGRAM, OVERLAP, messages, normalise, redact, trains


def grams(text: str, size: int) -> set[str]:
    """The n-grams of a text's words."""
    words = simplify_text(text).split()
    return {" ".join(words[at : at + size]) for at in range(max(len(words) - size + 1, 1))}


def signature(text: str) -> MinHash:
    """Its MinHash."""
    sketch = MinHash(num_perm=BUCKETS * HASHES)
    sketch.update_batch([gram.encode() for gram in grams(text, NGRAM)])
    return sketch


def overlap(text: str, known: set[str]) -> float:
    """Share of the text's n-grams that are known."""
    own = grams(text, DECONTAMINATE)
    return len(own & known) / len(own)


def main() -> None:
    """Read, clean, drop repeats and what is evaluated on, split, write."""
    rows = pd.concat([pd.read_json(f"data/collect/{name}.jsonl", lines=True, dtype=False) for name in ("official", "tickets")], ignore_index=True)
    for column in ("text", "completion", "label", "group"):
        rows[column] = rows[column].map(normalise)
    rows = rows[(rows["text"] != "") & (rows["text"].str.len() <= MAX_CHARS)]
    for column in ("text", "completion"):
        rows[column] = rows[column].map(redact)
    test = rows["source"] == "official"
    rows = rows[test | ~rows["text"].str.casefold().duplicated()]
    index = MinHashLSH(num_perm=BUCKETS * HASHES, params=(BUCKETS, HASHES))
    keep = []
    for at, text, source in zip(rows.index, rows["text"], rows["source"], strict=True):
        sketch = signature(text)
        repeat = bool(index.query(sketch))
        index.insert(at, sketch)
        keep.append(source == "official" or not repeat)
    rows = rows[keep]
    test = rows["source"] == "official"
    known = set().union(*(grams(text, DECONTAMINATE) for text in rows.loc[test, "text"]))
    rows = rows[test | (rows["text"].map(lambda text: overlap(text, known)) <= OVERLAP)]
    rows["messages"] = [messages(text, completion) for text, completion in zip(rows["text"], rows["completion"], strict=True)]
    test = rows["source"] == "official"
    train = pd.Series([trains(source, id) for source, id in zip(rows["source"], rows["id"], strict=True)], index=rows.index)
    Path("out").mkdir()
    for name, chosen in (("train", ~test & train), ("validation", ~test & ~train), ("test", test)):
        rows[chosen].to_json(f"out/{name}.jsonl", orient="records", lines=True, force_ascii=False)


if __name__ == "__main__":
    main()
