"""llama.cpp on a GGUF file, through llama-cpp-python."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.context_engine import ContextEngine
from stages.serve.live_batch import LiveBatch
from stages.serve.llamacpp import Cells, Model

FILE = "model.gguf"
PLACES = 255
"""Most answers in a batch: llama.cpp counts sequences up to 256, and one is the kept prefix."""


class LlamaCppEngine(ContextEngine):
    """A folder with `model.gguf` and the tokenizer beside it, as `stages.convert_gguf` writes it."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            ModelError: a file is missing or damaged, or llama-cpp-python is not installed.
        """
        if not (folder / FILE).is_file():
            raise ModelError(f"{folder / FILE} is missing", "run `dvc repro export`, or `dvc pull`")
        super().__init__(Chat(folder), settings, min(settings.batch, PLACES))
        self._model = Model(folder / FILE)

    def _open(self) -> Cells:
        return Cells(self._model, self._settings, self._places + 1)

    def live(self) -> LiveBatch:
        """A batch with cells of its own.

        Its prefix is encoded by a thread that ends: OpenMP keeps a team for each thread that called llama.cpp, and where the teams that live have more
        threads than there are processors, each wait in a step goes to sleep (36 ms a token in the place of 16, on two cores).
        """
        with ThreadPoolExecutor(1) as once:
            return once.submit(super().live).result()
