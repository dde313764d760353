"""`python -m stages.serve`: serve models/package on `serve.port`. `make serve` calls it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import conf
from conf.errors import ModelError
from conf.schema import Serve
from stages.intact import check_intact
from stages.serve.keys import VARIABLE, read

PACKAGE = Path("models/package")


def command(package: Path, settings: Serve) -> list[str]:
    """The command line that serves a Bento.

    Raises:
        ModelError: there is none.
    """
    if not (package / "bento.yaml").is_file():
        raise ModelError(f"{package} holds no Bento", "run `make` (or `dvc repro package`), or `dvc pull models/package`")
    return [sys.executable, "-m", "bentoml", "serve", str(package.resolve()), "--port", str(settings.port)]


def main() -> None:
    """Say where it will answer, then become the server."""
    from rich.console import Console

    settings: Serve = conf.load("serve")
    arguments = command(PACKAGE, settings)
    check_intact([str(PACKAGE)])
    if settings.upstream is not None:
        from stages.serve.upstream.engine import read_key

        read_key(settings.upstream, os.environ)
    who = "with a key" if read(os.environ) else f"open to everybody: {VARIABLE} names the keys"
    Console(stderr=True).print(f"serving {PACKAGE} on http://localhost:{settings.port}/v1, {who} (Ctrl-C ends it)", markup=False, highlight=False)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "1")
    os.environ.pop("PYTHONPATH", None)  # the Bento brings its own code
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    from stages.run import run

    run(main)
