"""The BentoML service: what `bentoml serve models/package` runs.

It reads `serve.json`, `engine/` and `guard/` beside its own source, so a Bento needs no repository. `/healthz`, `/readyz` and `/metrics` are answered by
BentoML, the last one with this service's metrics in it; `/readyz` answers once the model is loaded. On SIGTERM no new request is taken, those on
their way are answered, and what waits to be written down is written.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import bentoml

from stages.serve.api import close_service, create_app, open_service
from stages.serve.assistant import Assistant
from stages.serve.database import address
from stages.serve.keys import keyring
from stages.serve.store import Store

ROOT = Path(__file__).resolve().parents[2]

app = create_app()


@bentoml.service(name="assistant", workers=1, traffic={"timeout": 3600})  # `serve.limits.seconds` is the real one
@bentoml.asgi_app(app, path="/")
class Service:
    """One model, one process; requests wait in the scheduler's queue, never in the event loop."""

    def __init__(self) -> None:
        """Load the model."""
        self.assistant = Assistant.load(ROOT)
        open_service(app, self.assistant, keyring(), Store(address(os.environ), self.assistant.settings.events.days))
        gc.collect()
        gc.freeze()  # or each full collection walks over all that was loaded: 40 ms, within some request

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """End the engine's threads, and write down what waits."""
        close_service(app)

    def __is_ready__(self) -> bool:
        """Whether the model is loaded."""
        return self.assistant is not None
