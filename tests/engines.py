"""What every engine is asked in its tests."""

from __future__ import annotations

import random

from stages.serve.engine import Engine, Sampling

PROMPT = "<|im_start|>user\nwhere is my order<|im_end|>\n<|im_start|>assistant\n"


def requests(engine: Engine) -> list[tuple[list[int], list[list[int]]]]:
    """Long contexts with many short continuations, short ones with long continuations, and the odd cases."""
    rng, encode = random.Random(0), engine.chat.encode
    eos = min(engine.chat.eos_ids)
    long = encode(PROMPT * 4)
    some: list[tuple[list[int], list[list[int]]]] = [
        (long, [encode(t) for t in ("refund", "order status", "x", "cancel my order", "where", "size")]),
        (encode("ab"), [[rng.randrange(4, 200) for _ in range(30)] for _ in range(2)]),
        (long, [[5, eos, 7], [eos], [6, 7, 8, 9, 10]]),
        ([7], [[8], [9, 10]]),
        (long, [[], [11]]),
        (long, []),
    ]
    return some


def prompts(engine: Engine) -> list[list[int]]:
    texts = ["hello", "where is my order", "a", "cancel my order please now", "refund", "size of the tent", "hello"]
    return [engine.chat.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]


def decoded_in_part(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    """What `decode` tells of each prompt when the first is ended after two tokens, the second after three, and so on."""
    told: list[list[int]] = [[] for _ in asked]

    def on_token(index: int, token: int) -> bool:
        told[index].append(token)
        return len(told[index]) == index + 2

    engine.decode(asked, Sampling(max_tokens=12), on_token)
    return told
