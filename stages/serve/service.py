"""The BentoML service: what `bentoml serve models/package` runs.

It reads `serve.json`, `engine/` and `guard/` beside its own source, so a Bento needs no repository. `/healthz`, `/readyz` and
`/metrics` are BentoML's own; `/readyz` answers once the model is loaded.
"""

from __future__ import annotations

from pathlib import Path

import bentoml

from stages.serve.api import Assistant, create_app

ROOT = Path(__file__).resolve().parents[2]

app = create_app()


@bentoml.service(name="assistant", workers=1, traffic={"timeout": 300})
@bentoml.asgi_app(app, path="/")
class Service:
    """One model, one process; requests wait for the engine in threads, never in the event loop."""

    def __init__(self) -> None:
        """Load the model."""
        self.assistant = Assistant.load(ROOT)
        app.state.assistant = self.assistant

    def __is_ready__(self) -> bool:
        """Whether the model is loaded."""
        return self.assistant is not None
