"""A model's tokenizer and chat template without transformers: the tokens of training, at service time.

Reads a model folder's `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`. The
Jinja environment is that of transformers' `apply_chat_template` (sandboxed, immutable, `trim_blocks`, `loopcontrols`,
`tojson`, `raise_exception`, `strftime_now`, `generation` blocks), so both give the same text; a test compares them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ModelError

if TYPE_CHECKING:
    from jinja2 import Template

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Chat:
    """Turns conversations into token ids and back.

    Attributes:
        eos_ids: ids that end an answer.
        vocab_size: number of ids that the tokenizer knows.
    """

    def __init__(self, folder: Path) -> None:
        """Load from a model folder.

        Raises:
            ModelError: `tokenizer.json` is missing or broken, or the chat template has a syntax error.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing", "a model folder needs the fast tokenizer: run `dvc repro export`, or `dvc pull`")
        if "model" not in _read(path):
            raise ModelError(f"{path} holds no tokenizer", "save the tokenizer anew from its base")
        self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.folder = folder
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        config = _read(folder / "tokenizer_config.json")
        self._special = {name: token for name, value in sorted(config.items()) if name.endswith("_token") and (token := _token(value)) is not None}
        self._control = sorted((t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special), key=len, reverse=True)
        self._source = _template(folder, config)
        self._compiled = _compile(self._source, folder) if self._source is not None else None
        self.eos_ids: set[int] = self._ends(_read(folder / "generation_config.json"))

    def _ends(self, generation: Mapping[str, object]) -> set[int]:
        """End tokens: the generation config's, and the tokenizer's own."""
        listed = generation.get("eos_token_id")
        ids = {i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)}
        own = self._tokenizer.token_to_id(self._special["eos_token"]) if "eos_token" in self._special else None
        return ids | ({own} if own is not None else set())

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; tokens written out in it (`<|im_end|>`) become those tokens, as in training."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` for many texts."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, index: int) -> str | None:
        """The vocabulary entry of an id; null for one that the tokenizer does not know (padding of the embedding)."""
        entry: str | None = self._tokenizer.id_to_token(index)
        return entry

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str:
        """The conversation as the chat template writes it.

        Raises:
            ModelError: there is no template, or it refuses the conversation (roles in a wrong order, say).
        """
        from jinja2 import TemplateError

        if self._compiled is None:
            raise ModelError(f"{self.folder} has no chat template", "put chat_template.jinja beside tokenizer.json: a base without one cannot chat")
        copied = json.loads(json.dumps([dict(message) for message in messages]))  # plain data: nothing for a template to call
        try:
            return self._compiled.render(messages=copied, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._special)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # the others: of what it does to a value
            raise ModelError(f"the chat template refuses the conversation: {error}", "check the roles and their order") from error

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text of n characters has at least n / longest tokens."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def prompt(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Token ids after which the assistant's answer follows: `render`, then `encode`, as transformers does."""
        return self.encode(self.render(messages))

    def defuse(self, text: str) -> str:
        """The text with every written-out control token broken by a blank (`< |im_end|>`): a user must not open a turn of his own."""
        for token in self._control:
            if len(token) > 1:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _read(path: Path) -> dict[str, object]:
    """A JSON object, or an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}", "save the model anew") from error
    return value if isinstance(value, dict) else {}


def _token(value: object) -> str | None:
    """A special token, written as a text or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The chat template: a file of its own, else the tokenizer config's (the one named `default` of several)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    return template if isinstance(template, str) else None


def _compile(source: str, folder: Path) -> Template:
    """Compile as transformers' `_compile_jinja_template` does."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is just its content."""

        tags = {"generation"}  # noqa: RUF012  jinja2's own form

        def parse(self, parser: Parser) -> list[nodes.Node]:
            """Keep the body."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class SafeNamespace(Namespace):
        """A namespace without dunder attributes, so that a template cannot reach Python's internals."""

        def __init__(*args: object, **values: object) -> None:  # `namespace(self=…)` must work
            for name in values:
                SafeNamespace._check(name)
            Namespace.__init__(*args, **values)

        def __setitem__(self, name: str, value: object) -> None:
            SafeNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: str) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a chat template may not store {name!r} on a namespace")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form), namespace=SafeNamespace)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ModelError(f"{folder}: line {error.lineno} of the chat template: {error.message}", "fix the template where the base comes from") from error
