"""The CPU engine: OpenVINO, on the very folder that ctranslate2 opens.

`export` converts and stores one artefact for both, so either can serve what the other was measured on, and a LoRA variant is stored as the adapter it is.
"""

from __future__ import annotations

from pathlib import Path

from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.context_engine import ContextEngine
from stages.serve.engine_cache import opened
from stages.serve.openvino import Model, Pages


class OpenVinoEngine(ContextEngine):
    """A folder written by `stages.convert`: `to_ctranslate2`, or `store`."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            ModelError: a file is missing or damaged, it is no Llama-type model, or openvino is not installed.
        """
        with opened(folder) as whole:
            self._model = Model(whole, settings)
            super().__init__(Chat(folder), settings, settings.batch)

    def _open(self) -> Pages:
        return Pages(self._model, self._settings, self._places + 1)
