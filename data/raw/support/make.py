"""Make the support desk's data from the hand-written phrases beside this file: same seed, same bytes.

    python data/raw/support/make.py          rewrites tickets.jsonl, forum.html, stories.jsonl, attacks.jsonl, benign.jsonl here
    python data/raw/support/make.py FOLDER   writes them there

Reads:  phrases/*.txt (cores per intent, what surrounds them, answers, prompts, scenes).
Writes: five files; every person, number and address in them is invented (reserved example domains and documentation
        ranges; IBANs and cards that only have a right checksum).
"""

from __future__ import annotations

import html
import json
import random
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20250311
TICKETS, POSTS, STORIES, ATTACKS_WITH_MESSAGE, BENIGN_MESSAGES = 1240, 190, 220, 3, 60

WEIGHTS = {
    "order_status": 13,
    "cancel_order": 9,
    "change_address": 8,
    "return_item": 10,
    "refund_status": 10,
    "damaged_item": 10,
    "wrong_item": 8,
    "payment_failed": 9,
    "invoice_request": 8,
    "login_problem": 9,
    "delete_account": 7,
    "product_question": 11,
}

# key: names, noun, plural noun, whether it is a pair, whether it has sizes
PRODUCTS: dict[str, tuple[tuple[str, ...], str, str, bool, bool]] = {
    "tent": (("Tarn 2 tent", "Tarn tent", "Fjell family tent"), "tent", "tents", False, False),
    "stove": (("Cinder stove", "Cinder gas stove"), "stove", "stoves", False, False),
    "bag": (("Skua sleeping bag", "Skua -5 sleeping bag"), "sleeping bag", "sleeping bags", False, False),
    "boots": (("Tor walking boots", "Tor boots", "Garnet winter boots"), "boots", "boots", True, True),
    "shoes": (("Fell trail shoes", "Fell shoes"), "shoes", "shoes", True, True),
    "lamp": (("Merlin headlamp", "Merlin 300 headlamp"), "headlamp", "headlamps", False, False),
    "jacket": (("Bracken rain jacket", "Bracken jacket", "Sleet jacket"), "jacket", "jackets", False, True),
    "fleece": (("Rowan fleece",), "fleece", "fleeces", False, True),
    "filter": (("Brook water filter", "Brook filter"), "filter", "filters", False, False),
    "poles": (("Cairn trekking poles", "Cairn poles"), "poles", "poles", True, False),
    "mat": (("Moss sleeping mat", "Moss mat"), "mat", "mats", False, False),
    "cook": (("Finch cook set",), "cook set", "cook sets", False, False),
    "bottle": (("Beck bottle", "Beck steel bottle"), "bottle", "bottles", False, False),
    "pack": (("Larch 40 backpack", "Larch backpack", "Sorrel daypack"), "backpack", "backpacks", False, False),
    "gloves": (("Sable gloves",), "gloves", "gloves", True, True),
    "harness": (("Harrier harness",), "harness", "harnesses", False, True),
    "hammock": (("Kite hammock",), "hammock", "hammocks", False, False),
    "shirt": (("Wren merino shirt", "Wren shirt"), "shirt", "shirts", False, True),
    "drybag": (("Heron dry bag", "Heron 20 l dry bag"), "dry bag", "dry bags", False, False),
}
WEARABLE = [key for key, product in PRODUCTS.items() if product[4]]
SIZES = {True: [str(size) for size in range(37, 46)], False: ["XS", "S", "M", "L", "XL"]}
FAULTS = {"order_status", "refund_status", "damaged_item", "wrong_item", "payment_failed", "login_problem"}  # where an apology is due in any case
REGISTERS = {"plain": 27, "terse": 25, "polite": 16, "angry": 13, "foreign": 10, "verbose": 9}
CHANNELS = {"terse": ["chat", "chat", "chat", "app"], "verbose": ["email"], "polite": ["email", "email", "web"], "note": ["phone"]}
SHORTHAND = {
    "please": "pls",
    "you": "u",
    "your": "ur",
    "thanks": "thx",
    "because": "cos",
    "don't": "dont",
    "can't": "cant",
    "I'm": "im",
    "I've": "ive",
    "isn't": "isnt",
    "doesn't": "doesnt",
    "and": "&",
    "without": "w/o",
    "tomorrow": "tmrw",
    "account": "acc",
    "address": "addr",
    "want to": "wanna",
}


def sections(name: str) -> dict[str, list[str]]:
    """The `== name` blocks of a phrase file, without comments."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (HERE / "phrases" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            lines = found.setdefault(line[3:].strip(), [])
        elif line.strip() and not line.startswith("#"):
            lines.append(line.strip())
    return found


WORDS = {name: "|".join(lines).split("|") for name, lines in sections("words.txt").items()}


@dataclass
class Person:
    """A customer or a forum member; all of it invented."""

    id: str
    first: str
    last: str
    city: str
    register: str
    email: str
    phone: str
    iban: str
    card: str
    ip: str


@dataclass
class Scene:
    """What one message is about: the same product and order wherever they are named."""

    rng: random.Random
    person: Person
    kinds: list[str] = field(default_factory=lambda: list(PRODUCTS))

    def __post_init__(self) -> None:
        choose, rng = self.rng.choice, self.rng
        names, noun, plural, pair, _ = PRODUCTS[choose(self.kinds)]
        other = choose([p for p in PRODUCTS.values() if not p[3] and p[1] != noun])
        name, person, euros = choose(names), self.person, rng.randint(12, 260)
        day, day2 = rng.sample(WORDS["day"], 2)
        colour, colour2 = rng.sample(WORDS["colour"], 2)
        size, size2 = rng.sample(SIZES[pair and noun != "gloves"], 2)
        count = choose(["two", "three", "four", "five", "6", "7", "8", "9", "ten", "12"])
        self.slots = {
            "p": name if rng.random() < 0.7 else noun,
            "p2": other[0][0],
            "n": noun,
            "n_plural": plural,
            "other": other[1],
            "part": choose(["buckle", "strap", "clip", "valve", "cord"]),
            "a": "a pair of" if pair else "a",
            "is": "are" if pair else "is",
            "has": "have" if pair else "has",
            "was": "were" if pair else "was",
            "it": "them" if pair else "it",
            "they": "they" if pair else "it",
            "s": "" if pair else "s",
            "es": "" if pair else "es",
            "o": order_number(rng),
            "o2": order_number(rng),
            "customer": person.id,
            "voucher": choose(["TRAIL15", "KESTREL-20", "HIKE10", "WELCOME5"]),
            "when": choose(
                [
                    "last " + day,
                    f"{count} days ago",
                    "a week ago",
                    "two weeks ago",
                    f"on {rng.randint(1, 28)} {choose(WORDS['month'])}",
                    f"on the {rng.randint(4, 20)}th",
                    "yesterday",
                ]
            ),
            "when2": choose(["yesterday", "last week", f"on {day2}", "last month", f"in {choose(WORDS['month'])}", "the other day"]),
            "days": choose([f"{count} days", "two weeks", "almost a week", "over a week", "nearly a month", "ten working days"]),
            "day": day,
            "day2": day2,
            "month": choose(WORDS["month"]),
            "num": choose(["3", "4", "5", "6", "7", "8", "12"]),
            "num2": str(rng.randint(154, 193)),
            "city": choose(WORDS["city"]),
            "city2": choose(WORDS["city"]),
            "street": choose(WORDS["street"]).format(rng.randint(2, 140)),
            "carrier": choose(WORDS["carrier"]),
            "pay": choose(WORDS["payment"]),
            "colour": colour,
            "colour2": colour2,
            "size": size,
            "size2": size2,
            "kin": choose(["brother", "sister", "wife", "husband", "dad", "daughter", "boss", "neighbour"]),
            "amount": money(rng, euros),
            "amount2": money(rng, euros + rng.randint(5, 60)),
            "first": person.first,
            "last": person.last,
            "email": person.email,
            "phone": person.phone,
            "iban": person.iban,
            "card": person.card,
            "ip": person.ip,
        }

    def fill(self, text: str, **more: str) -> str:
        """Pick at every [a|b] and fill every {slot}."""
        while (innermost := re.search(r"\[([^\[\]]*)\]", text)) is not None:
            text = text[: innermost.start()] + self.rng.choice(innermost[1].split("|")) + text[innermost.end() :]
        return tidy(text.format(**{**self.slots, **more}))


def tidy(text: str) -> str:
    """Single blanks, none before a mark, `an` before a vowel."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([?.,!;])", r"\1", text)
    return re.sub(r"\ba (?=[aeio]\w)", "an ", text)


def order_number(rng: random.Random) -> str:
    """As customers write it."""
    return rng.choice(["K-{}", "K-{}", "K{}", "k-{}", "#{}", "{}", "KS{}"]).format(rng.randint(20417, 98642))


def money(rng: random.Random, euros: int) -> str:
    """As customers write it."""
    cents = rng.choice([0, 50, 90, 95])
    return rng.choice(["{}.{:02d} euros", "€{}.{:02d}", "{},{:02d} €", "£{}.{:02d}", "{} euro", "EUR {}.{:02d}", "{}.{:02d}"]).format(euros, cents)


def iban(rng: random.Random) -> str:
    """A made IBAN of a made bank with right check digits (ISO 7064 mod 97-10), some in groups of four."""
    country, body = rng.choice(
        [
            ("DE", f"00000000{rng.randrange(10**10):010d}"),
            ("GB", f"KSTL{rng.randrange(10**14):014d}"),
            ("AT", f"00000{rng.randrange(10**11):011d}"),
        ]
    )
    digits = "".join(str(int(c, 36)) for c in body + country + "00")
    number = f"{country}{98 - int(digits) % 97:02d}{body}"
    return number if rng.random() < 0.4 else " ".join(number[i : i + 4] for i in range(0, len(number), 4))


def phone(rng: random.Random) -> str:
    """Numbers that regulators keep free for fiction."""
    end = f"{rng.randint(100, 199)}"
    forms = ["+1 212 555 0{}", "(303) 555-0{}", "020 7946 0{}", "+44 20 7946 0{}", "+49 30 23125 {}", "030 23125 {}", "+1 720-555-0{}"]
    return rng.choice(forms).format(end)


def people(rng: random.Random, count: int, names: Iterable[str] = ()) -> list[Person]:
    """Invented people; `names` become their ids."""
    ids = list(names) or [f"C-{number}" for number in sorted(rng.sample(range(10200, 11900), count))]
    made = []
    for number in ids:
        first, last = rng.choice(WORDS["first"]), rng.choice(WORDS["last"])
        plain = [word.translate(str.maketrans("łéíüöß", "leiuos")).lower() for word in (first, last)]
        email = rng.choice(["{0}.{1}@example.com", "{0}{2}@example.org", "{0}_{1}@example.net", "{1}.{0}@mail.example.com"]).format(*plain, rng.randint(60, 99))
        ip = rng.choice(["192.0.2.{}", "198.51.100.{}", "203.0.113.{}", "2001:db8::{}"]).format(rng.randint(2, 250))
        register = rng.choices(list(REGISTERS), list(REGISTERS.values()))[0]
        made.append(Person(number, first, last, rng.choice(WORDS["city"]), register, email, phone(rng), iban(rng), rng.choice(WORDS["test card"]), ip))
    return made


# ---------------------------------------------------------------- how people write


def terse(rng: random.Random, text: str) -> str:
    """Thumbs on a phone: lower case, shorthand, few marks."""
    for long, short in SHORTHAND.items():
        if rng.random() < 0.45:
            text = re.sub(rf"\b{re.escape(long)}\b", short, text)
    if rng.random() < 0.6:
        text = text.lower()
    if rng.random() < 0.5:
        text = re.sub(r"[.!]+$", "", text)
    return re.sub(r"[.,](?= )", "", text) if rng.random() < 0.25 else text


def angry(rng: random.Random, text: str) -> str:
    """A few shouted words, more marks."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) > 3 and rng.random() < 0.06:
            words[index] = word.upper()
    text = " ".join(words)
    return re.sub(r"[.?]$", lambda m: rng.choice(["?", "??", "?!", "?!?"] if m[0] == "?" else [".", "!", "!!", "!!!"]), text)


def foreign(rng: random.Random, text: str) -> str:
    """English as a second language: dropped articles, uncontracted forms, other tenses."""
    for pattern, put, share in (
        (r"\b(the|a|an) (?=[a-z])", "", 0.35),
        (r"n't\b", " not", 0.8),
        (r"\bI'm\b", "I am", 1),
        (r"\bI've\b", "I have", 1),
        (r"\bca not\b", "can not", 1),
        (r"\bwo not\b", "will not", 1),
        (r"\bI (want|need)\b", r"I am \1ing", 0.3),
        (r"\b(Can|Could) you\b", "It is possible that you", 0.25),
        (r"\bfor (?=(two|three|four|five|\d+|ten) )", "since ", 0.7),
        (r"\bhas not\b", "did not", 0.4),
        (r"\bnow\b", "actually", 0.3),
        (r"\bmoney\b", "moneys", 0.2),
        (r"\bpackage|\bparcel", "packet", 0.4),
        (r"\bmany\b", "much", 0.4),
    ):
        text = re.sub(pattern, lambda m, put=put, share=share: m.expand(put) if rng.random() < share else m[0], text)
    return text


def typo(rng: random.Random, text: str) -> str:
    """One slip of the fingers in one longer word that is all letters; never in an address, which could then be somebody's."""
    spots = [m for m in re.finditer(r"(?<![\w@.])[a-z]{4,}(?![\w@]|\.\w)", text)]
    if not spots:
        return text
    spot = rng.choice(spots)
    word, at = spot[0], rng.randint(1, len(spot[0]) - 2)
    near = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wertyuiopoasdfghjkkxcvbnmn", strict=True))
    head, key, tail = word[:at], word[at], word[at + 1 :]
    slip = rng.choice([head + tail[0] + key + tail[1:], head + tail, head + key + key + tail, head + near[key] + tail])
    return text[: spot.start()] + slip + text[spot.end() :]


def mojibake(text: str) -> str:
    """UTF-8 read as Windows-1252, as a badly set mail gateway does."""
    curly = re.sub(r"(?<=\w)'(?=\w)", "\u2019", text).replace(" - ", " \u2013 ")
    try:
        return curly.encode("utf-8").decode("cp1252")
    except UnicodeDecodeError:
        return curly


def soil(rng: random.Random, text: str) -> str:
    """The dirt of channels: typos, encodings, entities, blanks, capitals."""
    for _ in range(rng.choices([0, 1, 2, 3], [76, 16, 6, 2])[0]):
        text = typo(rng, text)
    kind = rng.random()
    if kind < 0.045:
        return mojibake(text)
    if kind < 0.085:
        return html.escape(text, quote=False).replace("'", "&#39;").replace('"', "&quot;") + rng.choice(["", "&nbsp;"])
    if kind < 0.15:
        gap = rng.choice(["  ", " \t", "\n", "\u00a0", "   "])
        return rng.choice(["", " ", "\n", "\t"]) + text.replace(" ", gap, 1).replace(". ", f".{gap}") + rng.choice(["", "  ", " \n\n", "\r\n"])
    return text.upper() if kind < 0.165 else text


# ---------------------------------------------------------------- messages


class Desk:
    """The phrase files, and what can be said with them."""

    def __init__(self) -> None:
        self.intents, self.shared, self.replies = sections("intents.txt"), sections("shared.txt"), sections("replies.txt")
        self.prompts, self.stories = sections("prompts.txt"), sections("stories.txt")
        self.hello = "Thanks for writing. Please tell us what we can do for you."
        self.decks: dict[str, list[str]] = {}

    def deal(self, rng: random.Random, name: str, lines: list[str]) -> str:
        """A line of a shuffled deck: each comes up equally often."""
        deck = self.decks.setdefault(name, [])
        if not deck:
            deck.extend(rng.sample(lines, len(lines)))
        return deck.pop()

    def message(self, rng: random.Random, person: Person, intent: str, *, notes: bool = True, private: bool = True) -> tuple[str, str, str]:
        """(message before dirt, answer, register)."""
        core = self.deal(rng, f"intent {intent}", self.intents[intent])
        while core.startswith(("caller", "cust ")) and not notes:
            core = self.deal(rng, f"intent {intent}", self.intents[intent])
        kinds = re.findall(r"@(\w+)", core)
        scene = Scene(rng, person, (WEARABLE if kinds == ["wear"] else kinds) or list(PRODUCTS))
        core = re.sub(r"@\w+ ", "", core)
        register = person.register if rng.random() < 0.7 else rng.choices(list(REGISTERS), list(REGISTERS.values()))[0]
        if core.startswith(("caller", "cust ")):
            register = "note"

        def some(kind: str, share: float) -> list[str]:
            return [scene.fill(rng.choice(self.shared[kind]))] if rng.random() < share else []

        matter = scene.fill(core)
        if register not in ("terse", "note") and rng.random() < 0.9:
            matter = matter[0].upper() + matter[1:]
        match register:
            case "plain":
                before, after = some("greeting", 0.5) + some("opening", 0.2) + some("context", 0.08), some("emotion_plain", 0.2) + some("closing", 0.35)
            case "polite":
                before, after = some("greeting", 0.85) + some("opening", 0.2) + some("context", 0.08), some("emotion_polite", 0.5) + some("closing", 0.8)
            case "angry":
                before, after = some("greeting", 0.1) + some("opening_angry", 0.5), some("emotion_angry", 0.6)
            case "verbose":
                before, after = some("greeting", 0.8) + some("opening", 0.7), some("context", 0.8) + some("emotion_plain", 0.4) + some("closing", 0.6)
            case "foreign":
                before, after = some("greeting", 0.7), some("emotion_plain", 0.2) + some("closing_foreign", 0.6)
            case _:
                before, after = some("greeting", 0.06) if register == "terse" else [], some("closing", 0.06) if register == "terse" else []
        account = intent in ("login_problem", "delete_account")
        known = scene.slots["email" if account else "o"] in matter
        if not known and not account and intent != "product_question" and register != "note" and rng.random() < 0.3:
            lines = [line for line in self.shared["number"] if person.id.startswith("C-") or "{customer}" not in line]
            after.insert(0, scene.fill(rng.choice(lines)))
            known = True
        if private and register != "note" and rng.random() < 0.1:
            after.insert(0, scene.fill(rng.choice(self.shared["contact"])))
        if rng.random() < 0.4 and before and before[0].endswith(",") and matter[:2] not in ("I ", "I'"):
            matter = matter[0].lower() + matter[1:]
        matter = self.end(matter)
        text = " ".join([*before, matter, *after])
        text = {"terse": terse, "angry": angry, "foreign": foreign}.get(register, lambda _, t: t)(rng, text)
        if scene.slots["n"].rstrip("s") not in text.lower():
            scene.slots |= {"n": "item", "is": "is", "it": "it"}
        return text, self.reply(scene, intent, known, register), register

    def end(self, text: str) -> str:
        """With a mark at the end."""
        return text if text[-1] in ".?!" else text + "."

    def reply(self, scene: Scene, intent: str, known: bool, register: str) -> str:
        """An answer in the house style that fits what the message says."""
        fitting = [line.split(": ", 1)[1] for line in self.replies[intent] if line.split(":")[0] in ("any", "known" if known else "unknown")]
        if register == "angry" or intent not in FAULTS:
            fitting = [line for line in fitting if line.startswith("Sorry") == (register == "angry")]
        return scene.fill(scene.rng.choice(fitting))


def tickets(desk: Desk, rng: random.Random) -> list[dict[str, str | None]]:
    """Tickets in the order of arrival, with repeats, gaps, dirt and injected instructions."""
    customers = people(rng, 520)
    frequency = [rng.choice([1, 1, 2, 2, 3, 5]) for _ in customers]
    intents = [intent for intent, weight in WEIGHTS.items() for _ in range(round(TICKETS * weight / sum(WEIGHTS.values())))]
    rng.shuffle(intents)
    rows: list[dict[str, str | None]] = []
    for intent in intents:
        person = rng.choices(customers, frequency)[0]
        text, reply, register = desk.message(rng, person, intent)
        if rng.random() < 0.035:
            text = f"{text} {Scene(rng, person).fill(rng.choice(desk.shared['injection']))}"
        channel = rng.choice(CHANNELS.get(register, ["email", "chat", "web", "app", "social"]))
        rows.append({"customer_id": person.id, "channel": channel, "message": soil(rng, text), "intent": intent, "reply": reply})
    clean = list(rows)
    for row in rng.sample(clean, round(0.045 * len(clean))):
        rows.insert(min(len(rows), rows.index(row) + rng.randint(1, 9)), dict(row))
    for row in rng.sample([r for r in clean if len(str(r["message"]).split()) >= 14], round(0.045 * len(clean))):
        rows.insert(min(len(rows), rows.index(row) + rng.randint(2, 30)), {**row, "message": again(desk, rng, str(row["message"]))})
    for fields, share in ((("message",), 0.012), (("intent",), 0.012), (("reply",), 0.014), (("intent", "reply"), 0.006)):
        for row in rng.sample(rows, round(share * len(rows))):
            row.update({name: rng.choice([None, "", "  "]) for name in fields})
    for text in WORDS["junk"]:
        person, channel, intent = rng.choice(customers), rng.choice(["chat", "app"]), rng.choice(list(WEIGHTS))
        row = {"customer_id": person.id, "channel": channel, "message": text, "intent": intent, "reply": desk.hello}
        rows.insert(rng.randrange(len(rows)), row)
    return [{"ticket_id": f"T-{200100 + 3 * number}", **row} for number, row in enumerate(rows)]


def again(desk: Desk, rng: random.Random, text: str) -> str:
    """The same message sent once more, not quite the same."""
    way = rng.random()
    number = re.search(r"(?i)(\bk-|\bks?|#)(\d{5})\b", text)
    if number and way < 0.35:
        return f"{text[: number.start(2)]}{int(number[2]) + rng.randint(1, 9)}{text[number.end(2) :]}"
    if way < 0.6:
        return text.rstrip(" .!?\n") + rng.choice(["!!", "...", "?!", " :("])
    return f"{text.rstrip()} {Scene(rng, people(rng, 1)[0]).fill(rng.choice(desk.shared['near']))}"


def forum(desk: Desk, rng: random.Random) -> str:
    """A long thread as the forum's page shows it: one article per question, with the staff's answer."""
    members = people(rng, 0, WORDS["handle"])
    intents = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=POSTS)
    posts = []
    minute = 0
    for number, intent in enumerate(intents, 1):
        person = rng.choice(members)
        text, reply, _ = desk.message(rng, person, intent, notes=False)
        if rng.random() < 0.25:
            text += " " + Scene(rng, person).fill(rng.choice(desk.shared["chatter"]))
        for _ in range(rng.choices([0, 1, 2], [75, 18, 7])[0]):
            text = typo(rng, text)
        minute += rng.randint(7, 900)
        day, clock = minute // 1440, f"{minute // 60 % 24:02d}:{minute % 60:02d}"
        month, date = 1 + day // 28, 1 + day % 28
        staff = rng.choice(WORDS["staff"])
        answer = f'\n    <div class="answer"><p>{html.escape(reply)}</p><cite>{staff}</cite></div>' if rng.random() > 0.03 else ""
        label = f' data-intent="{intent}"' if rng.random() > 0.02 else ""
        posts.append(
            f'  <article class="post" id="p{number}" data-id="forum-{number:04d}" data-author="{person.id}"{label}>\n'
            f'    <header><b>{person.id}</b> <time datetime="2025-{month:02d}-{date:02d}T{clock}">{date} {WORDS["month"][month - 1]}, {clock}</time>'
            f' <a href="#p{number}">#{number}</a></header>\n'
            f'    <div class="question"><p>{html.escape(text)}</p></div>{answer}\n'
            f"    <footer>{rng.choice(['', '', '1 like', '2 likes', f'{rng.randint(3, 19)} likes'])}</footer>\n  </article>"
        )
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n  <meta charset="utf-8">\n  <title>Ask the desk: one thread for all questions | Kestrel Basecamp</title>\n'
        '  <meta name="description" content="Made for Trunkline by make.py; no real shop, members or orders. Apache-2.0.">\n'
        "  <style>body{font:16px/1.5 sans-serif;max-width:46rem}.post{border-top:1px solid #ccc}.answer{background:#eef5ee}</style>\n"
        "</head>\n<body>\n"
        '<nav><a href="/">Basecamp</a> &rsaquo; <a href="/shop">Shop talk</a> &rsaquo; Ask the desk</nav>\n'
        "<h1>Ask the desk: one thread for all questions</h1>\n"
        '<p class="notice">Moderator: be kind, no passwords or card numbers in public. The desk answers here on working days.</p>\n<main>\n'
    )
    return head + "\n".join(posts) + "\n</main>\n<footer><p>Kestrel Basecamp is made up, like everything on this page.</p></footer>\n</body>\n</html>\n"


def stories(desk: Desk, rng: random.Random) -> list[dict[str, str]]:
    """Days at the desk, for a model to learn English and the trade from."""
    rows = []
    for number in range(STORIES):
        person = people(rng, 1)[0]
        scene = Scene(rng, person)
        hero, other = rng.sample(WORDS["first"], 2)
        cast = {"hero": hero, "other_hero": other}

        def line(kind: str, scene: Scene = scene, person: Person = person, cast: dict[str, str] = cast) -> str:
            intent = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            text, reply, _ = desk.message(rng, person, intent, notes=False, private=False)
            return scene.fill(desk.deal(rng, f"story {kind}", desk.stories[kind]), **cast, i=intent, q=text, r=reply)

        middle = [line(rng.choice(["middle", "middle", "aside"])) for _ in range(rng.randint(4, 7))]
        rows.append({"id": f"story-{number:04d}", "text": "\n\n".join([line("opening"), *middle, line("end")])})
    return rows


def prompts(desk: Desk, rng: random.Random) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(attacks with their family, benign prompts)."""

    def say(line: str) -> str:
        person = people(rng, 1)[0]
        intent = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        return Scene(rng, person).fill(line, message=desk.message(rng, person, intent, notes=False, private=False)[0])

    attacks = [
        {"text": say(line), "family": family}
        for family, lines in desk.prompts.items()
        if family != "benign"
        for line in lines
        for _ in range(ATTACKS_WITH_MESSAGE if "{message}" in line else 1)
    ]
    lines = desk.prompts["benign"]
    benign = [say(line) for line in lines] + [say(line) for line in lines if "{" in line or "[" in line] + [say("{message}") for _ in range(BENIGN_MESSAGES)]
    return attacks, [{"text": text} for text in dict.fromkeys(benign)]


def jsonl(rows: Iterable[dict[str, str | None]] | Iterable[dict[str, str]]) -> str:
    """One object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write every file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    folder.mkdir(parents=True, exist_ok=True)
    desk = Desk()
    attacks, benign = prompts(desk, random.Random(f"{SEED} prompts"))
    for name, text in (
        ("tickets.jsonl", jsonl(tickets(desk, random.Random(f"{SEED} tickets")))),
        ("forum.html", forum(desk, random.Random(f"{SEED} forum"))),
        ("stories.jsonl", jsonl(stories(desk, random.Random(f"{SEED} stories")))),
        ("attacks.jsonl", jsonl(attacks)),
        ("benign.jsonl", jsonl(benign)),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
