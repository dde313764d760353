"""OpenVINO on a CPU: a model, and a context of sequences whose keys and values lie in pages.

A page holds PAGE tokens of one sequence, and may belong to several: who goes on in a page that others have too takes a copy of it.
Weights in int8 are multiplied by values in int8, with a scale for each group of them; all else is float32, keys and values too, so that the answers
do not depend on whether a processor has bfloat16. The bits are the same for any number of threads; what else is in a batch may reach the last of them (of 40
answers of 30 tokens by the tuned SmolLM2-135M, 4 become others when each is made alone).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.files import read_json
from stages.serve.contexts import Context, Entry
from stages.serve.llama_graph import PAGE, Llama
from stages.serve.model_bin import tensors

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

FILES = ("model.bin", "config.json")
GROUPS = (64, 32)
"""How many values may share a scale: the first that divides the width of every matrix, else all stay float32. `tests.bench.serve` has what it is worth."""


@functools.cache
def library() -> ModuleType:
    """The package, which would tell its maker of every import: without openvino_telemetry it has nobody to tell it to.

    Raises:
        ModelError: it is not installed.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        for part in ("openvino.op", "openvino.opset15"):
            importlib.import_module(part)
        return sys.modules["openvino"]
    except ImportError as error:
        raise ModelError(f"serve.engine.kind=openvino, and openvino does not load: {error}", "pip install -r requirements.txt") from error


class Model:
    """The weights, and what was compiled for this processor."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Compile a folder of ctranslate2's.

        Raises:
            ModelError: a file is missing or damaged, or it is no Llama-type model.
        """
        for name in FILES:
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing", "run `dvc repro export`, or `dvc pull`")
        if not isinstance(epsilon := read_json(folder / "config.json").get("layer_norm_epsilon"), float):
            raise ModelError(f"{folder / 'config.json'}: layer_norm_epsilon is {epsilon!r}, and must be a number", "run `dvc repro export`, or `dvc pull`")
        self.library = library()
        llama = Llama(self.library, tensors(folder / "model.bin"), epsilon)
        self.vocabulary: int = llama.vocabulary
        self.shape = (llama.kv_heads, PAGE, llama.size)
        """Of a page."""
        group = next((group for group in GROUPS if not any(width % group for width in llama.widths)), 0)
        wanted = {
            "INFERENCE_NUM_THREADS": settings.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }  # fmt: skip
        try:
            self.compiled = self.library.Core().compile_model(llama.write(), "CPU", wanted)
        except RuntimeError as error:
            raise ModelError(
                f"{folder} does not load: {' '.join(str(error).split())}", "remove it and run `dvc repro export`, or set serve: ctranslate2"
            ) from error
        self.caches = [name for one in self.compiled.inputs if "_cache." in (name := one.get_any_name())]


@dataclass
class Read:
    """What a sequence has read, and where it lies."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens."""


class Pages(Context):
    """Sequences in pages."""

    def __init__(self, model: Model, settings: EngineSettings, sequences: int) -> None:
        """Set memory aside; none of it is taken before it is used.

        Args:
            settings: `context`, the number of cells.
            sequences: how many. Each may leave most of its first and of its last page empty.
        """
        import numpy as np

        super().__init__(model.vocabulary, settings.context)
        self._library, self._request = model.library, model.compiled.create_infer_request()
        count = -(-settings.context // PAGE) + 2 * sequences
        self._free, self._users = list(range(count - 1, -1, -1)), Counter[int]()
        self._sequences: dict[int, Read] = {}
        self._caches = {name: np.zeros((count, *model.shape), np.float32) for name in model.caches}
        for name, cache in self._caches.items():
            self._request.set_tensor(name, self._library.Tensor(cache, shared_memory=True))

    def share(self, source: int, target: int, count: int) -> None:
        """Let an empty sequence begin with the first so many tokens of another one."""
        pages = self._sequences[source].pages[: -(-count // PAGE)] if count else []
        self._users.update(pages)
        self._sequences[target] = Read(list(pages), count)

    def forget(self, sequence: int, start: int = 0) -> None:
        """Take from a sequence all tokens from a position on."""
        if (known := self._sequences.get(sequence)) is None or start >= known.length:
            return
        for page in known.pages[-(-start // PAGE) :]:
            self._release(page)
        del known.pages[-(-start // PAGE) :]
        known.length = start

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    def _page(self) -> int:
        """A free one."""
        if not self._free:
            raise ModelError("there is no page left for another token", "set a larger serve.engine.context")
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _grow(self, known: Read, count: int) -> None:
        """Make room for so many tokens more."""
        if known.length % PAGE and self._users[last := known.pages[-1]] > 1:
            known.pages[-1] = own = self._page()
            for cache in self._caches.values():
                cache[own] = cache[last]
            self._release(last)
        known.length += count
        while len(known.pages) * PAGE < known.length:
            known.pages.append(self._page())

    def encode(self, entries: Sequence[Entry]) -> Sequence[NDArray[np.float32]]:
        """Encode tokens; gives what follows each wanted one."""
        import numpy as np

        self.encoded += len(entries)
        begins, past, pages, page_begins, longest = [0], list[int](), list[int](), [0], 0
        for sequence, members in groupby(entries, key=lambda entry: entry.sequence):
            known, count = self._sequences.setdefault(sequence, Read()), len(list(members))
            past.append(known.length)
            self._grow(known, count)
            begins.append(begins[-1] + count)
            pages += known.pages
            page_begins.append(len(pages))
            longest = max(longest, known.length)
        wanted = [i for i, entry in enumerate(entries) if entry.wanted]
        given: dict[str, NDArray[Any]] = {
            "input_ids": np.array([entry.token for entry in entries], np.int64), "position_ids": np.array([entry.position for entry in entries], np.int64),
            "rows": np.array(wanted or [0], np.int64), "past_lens": np.array(past, np.int32), "subsequence_begins": np.array(begins, np.int32),
            "block_indices": np.array(pages, np.int32), "block_indices_begins": np.array(page_begins, np.int32), "max_context_len": np.array(longest, np.int32),
        }  # fmt: skip
        for name, values in given.items():
            self._request.set_tensor(name, self._library.Tensor(values))
        try:
            self._request.infer()
        except RuntimeError as error:
            raise ModelError(f"OpenVINO could not encode {len(entries)} tokens: {' '.join(str(error).split())}", "set serve: ctranslate2") from error
        rows: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return list(rows[: len(wanted), 0])
