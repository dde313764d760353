"""llama.cpp through the C functions that llama-cpp-python binds: a model, and a context.

Cells. A context has one pool of cells, each of which holds the keys and values of one token in every block; a cell may belong to several sequences
at once, so copying a prefix copies nothing. Attention skips the cells of other sequences.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.contexts import Context, Entry

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

INSTALL = "pip install -e '.[llamacpp]' (a C++ compiler builds it in some minutes), or choose serve: ctranslate2"
ERROR = 4
"""Level of llama.cpp's log."""

MOST = 512
"""Most tokens of one `encode`."""
SINGLY = 6
"""So many tokens in q8_0 are encoded one by one: llama.cpp's matrix product for several is slower there. Milliseconds of one thread for 1, 2, 4, 6, 8 and
16 tokens of SmolLM2-135M on an AMD EPYC with AVX-512: 5.9, 24, 34, 45, 44, 49; in bfloat16 8.2, 11, 16, 17, 26, 30."""
F32, F16 = 0, 1
"""GGML's numbers of these types."""

CALLBACKS: list[object] = []
"""llama.cpp keeps their address alone."""

log = logging.getLogger(__name__)


@functools.cache
def library() -> ModuleType:
    """The bindings, silenced but for errors.

    Raises:
        ModelError: they are not installed, or were built for another processor.
    """
    try:
        bindings = importlib.import_module("llama_cpp.llama_cpp")
    except ImportError as error:
        raise ModelError("serve.engine.kind=llamacpp, and llama-cpp-python is not installed", INSTALL) from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"llama-cpp-python does not load: {error}", "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python") from error
    CALLBACKS.append(bindings.llama_log_callback(_told))
    bindings.llama_log_set(CALLBACKS[0], None)
    bindings.llama_backend_init()
    return bindings


def _told(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        log.error("llama.cpp: %s", text.decode(errors="replace").strip())


class Model:
    """The weights, mapped into memory.

    Attributes:
        vocabulary: number of ids that it knows.
    """

    def __init__(self, file: Path) -> None:
        """Load a GGUF file.

        Raises:
            ModelError: it is damaged, or no model that llama.cpp knows.
        """
        self.library = library()
        self.pointer = self.library.llama_model_load_from_file(os.fsencode(file), self.library.llama_model_default_params())
        if not self.pointer:
            raise ModelError(f"{file} does not load: the log says why", "remove it and run `dvc repro export`, or `dvc pull`")
        weakref.finalize(self, self.library.llama_model_free, self.pointer)
        self.vocabulary: int = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.pointer))


class Cells(Context):
    """Sequences of tokens that a model has read. For one thread at a time."""

    def __init__(self, model: Model, settings: EngineSettings, sequences: int) -> None:
        """Set memory aside: `settings.context` cells.

        Args:
            settings: threads; in float32, keys and values are so too, else float16.
            sequences: how many, numbered from 0.

        Raises:
            ModelError: there is not so much memory.
        """
        super().__init__(model.vocabulary, settings.context)
        self._model, self._library = model, model.library
        wanted = self._library.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.n_batch, wanted.n_ubatch = settings.context, sequences, MOST, MOST
        wanted.n_threads = wanted.n_threads_batch = settings.threads
        wanted.kv_unified, wanted.no_perf = True, True
        wanted.flash_attn_type = int(settings.quantization != "float32")
        wanted.type_k = wanted.type_v = F32 if settings.quantization == "float32" else F16
        self._pointer = self._library.llama_init_from_model(model.pointer, wanted)
        if not self._pointer:
            raise ModelError(f"llama.cpp could not set memory aside for {settings.context} tokens: the log says why", "set a smaller serve.engine.context")
        weakref.finalize(self, self._library.llama_free, self._pointer)
        self._memory = self._library.llama_get_memory(self._pointer)
        self._batch = self._library.llama_batch_init(MOST, 0, 1)
        weakref.finalize(self, self._library.llama_batch_free, self._batch)
        self._singly = SINGLY if settings.quantization == "q8_0" else 1

    def encode(self, entries: Sequence[Entry]) -> list[NDArray[np.float32]]:
        """Encode tokens, each after those that its sequence has; gives what follows each wanted one.

        Returns:
            Arrays of shape (vocabulary,), valid until the next call.

        Raises:
            ModelError: llama.cpp fails.
        """
        self.encoded += len(entries)
        if len(entries) > self._singly:
            return self._decode(entries)
        return [row.copy() for entry in entries for row in self._decode([entry])]

    def _decode(self, entries: Sequence[Entry]) -> list[NDArray[np.float32]]:
        import numpy as np

        batch = self._batch
        for i, entry in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = entry.token, entry.position, 1, entry.wanted
            batch.seq_id[i][0] = entry.sequence
        batch.n_tokens = len(entries)
        if code := self._library.llama_decode(self._pointer, batch):
            raise ModelError(f"llama.cpp could not encode {len(entries)} tokens: code {code}", "set a larger serve.engine.context")
        found = [self._library.llama_get_logits_ith(self._pointer, i) for i, entry in enumerate(entries) if entry.wanted]
        return [np.ctypeslib.as_array(row, (self._model.vocabulary,)) for row in found]

    def share(self, source: int, target: int, count: int) -> None:
        """Let an empty sequence begin with the first so many tokens of another one."""
        self._library.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def forget(self, sequence: int, start: int = 0) -> None:
        """Take from a sequence all tokens from a position on."""
        self._library.llama_memory_seq_rm(self._memory, sequence, start, -1)
