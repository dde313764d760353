"""A Llama-type model of ctranslate2's format as a graph of OpenVINO's operations, with attention over pages of keys and values.

The graph is written in the forms that OpenVINO's CPU plugin has one kernel for: RMS norm, rotary positions, products with 8-bit rows, and
paged attention, which is OpenVINO's own operation for continuous batching (its GenAI library writes the same one). A batch is one row of tokens,
whoever they belong to; what is known of each sequence comes in beside it:

    input_ids, position_ids        (tokens,)
    past_lens                      (sequences,): tokens that each has read before
    subsequence_begins             (sequences + 1,): where the tokens of each begin, and the end
    block_indices                  pages of each sequence, one sequence after another
    block_indices_begins           (sequences + 1,): where the pages of each begin, and the end
    max_context_len                (): tokens of the longest, these included
    rows                           (wanted,): tokens after which the logits are wanted
    key_cache.0, value_cache.0, …  (pages, heads, PAGE, head size), which it writes into

and out come the logits, (wanted, 1, vocabulary).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import ModelError

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray
    from openvino import Model, Node

PAGE = 32
"""Tokens of a page, as the CPU plugin wants it."""
SCALARS: dict[str, tuple[float, ...]] = {
    "activation": (2,), "alibi": (0,), "pre_norm": (1,), "scale_embeddings": (0,), "start_from_zero_embedding": (0,),
    "rotary_interleave": (0,), "alibi_use_positive_positions": (0, 1), "alignment_heads": (0, 1), "alignment_layer": (-1,), "scale_alibi": (0, 1),
}  # fmt: skip
"""Numbers of the architecture, and the values with which the model is what is written here (activation 2 is SiLU)."""
READ = {"num_heads", "num_heads_kv", "head_dim", "rotary_base"}
"""Numbers of the architecture that are taken as they are."""
FIRST = "decoder/layer_0/self_attention"
"""Where the numbers of every block are read."""
REMEDY = "set serve: ctranslate2, or choose another base"


class Llama:
    """Writes the graph."""

    def __init__(self, openvino: ModuleType, tensors: Mapping[str, NDArray[Any]], epsilon: float) -> None:
        """Begin.

        Args:
            openvino: the package.
            tensors: those of model.bin.
            epsilon: of the norms.

        Raises:
            ModelError: it is no Llama-type model.
        """
        self._openvino, self.op = openvino, openvino.opset15
        self._tensors, self._epsilon = tensors, np.float32(epsilon)
        self._used: set[str] = set()
        self.heads = int(self._scalar("decoder/num_heads"))
        self.kv_heads = int(self._scalar(f"{FIRST}/num_heads_kv", self.heads))
        self.vocabulary, width = self._take("decoder/embeddings/weight").shape
        self.size = int(self._scalar(f"{FIRST}/head_dim", width // self.heads))
        self._check()
        self.widths = {values.shape[1] for values in tensors.values() if values.ndim == 2}
        """Columns of the matrices."""
        self.layers = sum(name.endswith("/ffn/linear_0/weight") for name in tensors)
        self._shared: dict[str, Node] = {}

    def _check(self) -> None:
        accepted = SCALARS | {"rotary_dim": (0, self.size)}  # 0: the whole head
        for name, values in self._tensors.items():
            last = name.rpartition("/")[2]
            if values.shape == () and last not in READ and float(values) not in accepted.get(last, ()):
                wanted = f"must be {accepted[last][0]:g}" if last in accepted else "is not known"
                raise ModelError(f"{name} is {float(values):g}; for OpenVINO it {wanted}", REMEDY)

    def _scalar(self, name: str, otherwise: float | None = None) -> float:
        return float(self._take(name)) if otherwise is None or name in self._tensors else otherwise

    def _take(self, name: str) -> NDArray[Any]:
        if name not in self._tensors:
            raise ModelError(f"model.bin has no {name}, which a Llama-type model has", REMEDY)
        self._used.add(name)
        return self._tensors[name]

    def _constant(self, values: NDArray[Any] | np.generic) -> Node:
        return self.op.constant(np.asarray(values, order="C"))

    def _numbers(self, *values: int) -> Node:
        return self._constant(np.array(values, np.int64))

    def _matrix(self, name: str) -> Node:
        """In float32: as it is stored, or 8-bit rows by the scale of each, which the plugin multiplies as they are."""
        if name not in self._shared:
            rows = self._take(f"{name}/weight")
            if rows.dtype == np.int8:
                scale = np.float32(1) / self._take(f"{name}/weight_scale").astype(np.float32)
                self._shared[name] = self.op.multiply(self.op.convert(self._constant(rows), "f32"), self._constant(scale[:, None]))
            elif rows.dtype == np.float32:
                self._shared[name] = self._constant(rows)
            else:
                raise ModelError(f"{name}/weight is of type {rows.dtype}; OpenVINO gets int8 or float32", "set serve.engine.quantization: int8")
        return self._shared[name]

    def _linear(self, x: Node, name: str) -> Node:
        found = self.op.matmul(x, self._matrix(name), False, True)
        return self.op.add(found, self._constant(self._take(f"{name}/bias"))) if f"{name}/bias" in self._tensors else found

    def _norm(self, x: Node, name: str) -> Node:
        op = self.op
        mean = op.reduce_mean(op.power(x, self._constant(np.float32(2))), self._numbers(-1), keep_dims=True)
        scaled = op.multiply(x, op.divide(self._constant(np.float32(1)), op.sqrt(op.add(mean, self._constant(self._epsilon)))))
        return op.multiply(self._constant(self._take(f"{name}/gamma")), scaled)

    def _angles(self, positions: Node) -> tuple[Node, Node]:
        """Cosine and sine of each position: shape (tokens, 1, 1, head size)."""
        op, base = self.op, np.float32(self._scalar(f"{FIRST}/rotary_base"))
        frequencies = np.float32(1) / base ** (np.arange(0, self.size, 2, dtype=np.float32) / np.float32(self.size))
        half = op.multiply(op.unsqueeze(op.convert(positions, "f32"), self._numbers(2)), self._constant(frequencies[None, None]))
        whole = op.concat([half, half], -1)
        return op.unsqueeze(op.cos(whole), self._numbers(1)), op.unsqueeze(op.sin(whole), self._numbers(1))

    def _turned(self, x: Node, heads: int, norm: str, angles: tuple[Node, Node]) -> Node:
        """Queries or keys, normed where the model does so, by their position: (tokens, 1, heads * size) -> (tokens, heads * size)."""
        op, half, order = self.op, self.size // 2, self._numbers(0, 2, 1, 3)
        x = op.reshape(x, self._numbers(0, 0, heads, self.size), True)
        x = op.transpose(self._norm(x, norm) if f"{norm}/gamma" in self._tensors else x, order)
        first = op.slice(x, self._numbers(0), self._numbers(half), self._numbers(1), self._numbers(3))
        second = op.slice(x, self._numbers(half), self._numbers(2**31 - 1), self._numbers(1), self._numbers(3))
        across = op.concat([op.multiply(second, self._constant(np.float32(-1))), first], -1)
        return self._flat(op.transpose(op.add(op.multiply(x, angles[0]), op.multiply(across, angles[1])), order), heads)

    def _flat(self, x: Node, heads: int) -> Node:
        return self.op.reshape(x, self._numbers(-1, heads * self.size), False)

    def _attention(self, x: Node, name: str, angles: tuple[Node, Node], caches: tuple[Node, Node], inputs: Mapping[str, Node]) -> Node:
        heads, kv_heads = self.heads, self.kv_heads
        sizes = self._numbers(heads * self.size, kv_heads * self.size, kv_heads * self.size)
        query, key, value = self.op.variadic_split(self._linear(x, f"{name}/linear_0"), self._numbers(-1), sizes).outputs()
        whole, real, none = (self._constant(np.zeros(0, kind)) for kind in (np.int32, np.float32, np.uint8))
        zero = self._constant(np.int32(0))
        given: list[Any] = [
            self._turned(query, heads, f"{name}/q_norm", angles), self._turned(key, kv_heads, f"{name}/k_norm", angles), self._flat(value, kv_heads), *caches,
            *(inputs[part] for part in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")),
            self._constant(np.float32(self.size**-0.5)),
            zero, real, inputs["max_context_len"],  # no sliding window, no alibi
            whole, whole, whole, real, real, zero, zero, self._constant(np.zeros((0, 0, 0, 0), np.float32)),  # no scores of pages, none turned, none left out
            zero, whole, whole, whole, whole, none, whole,  # no adaptive turning, no sinks, no token types
        ]  # fmt: skip
        node = self._openvino.op._PagedAttentionExtension([one.output(0) if hasattr(one, "output") else one for one in given])
        for part, number in (("num_k_heads", kv_heads), ("k_head_size", self.size), ("num_v_heads", kv_heads), ("v_head_size", self.size)):
            node.get_rt_info()[part] = number
        return self._linear(self.op.unsqueeze(node.output(0), self._numbers(1)), f"{name}/linear_1")

    def write(self) -> Model:
        """The graph.

        Raises:
            ModelError: the model has a tensor that a Llama does not have, or lacks one.
        """
        op, dynamic = self.op, (self._openvino.PartialShape.dynamic(4), self._openvino.Type.dynamic)
        inputs = {name: op.parameter([-1], np.int64, name=name) for name in ("input_ids", "position_ids", "rows")}
        inputs |= {name: op.parameter([-1], np.int32, name=name) for name in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")}
        inputs["max_context_len"] = op.parameter([], np.int32, name="max_context_len")
        for name in (f"{part}_cache.{layer}" for layer in range(self.layers) for part in ("key", "value")):
            inputs[name] = op.parameter(*dynamic, name=name)
        x = op.gather(self._matrix("decoder/embeddings"), op.unsqueeze(inputs["input_ids"], self._numbers(1)), self._numbers(0))
        angles = self._angles(op.unsqueeze(inputs["position_ids"], self._numbers(1)))
        for layer in range(self.layers):
            name, caches = f"decoder/layer_{layer}", (inputs[f"key_cache.{layer}"], inputs[f"value_cache.{layer}"])
            x = op.add(x, self._attention(self._norm(x, f"{name}/self_attention/layer_norm"), f"{name}/self_attention", angles, caches, inputs))
            seen = self._norm(x, f"{name}/ffn/layer_norm")
            gated = op.multiply(op.swish(self._linear(seen, f"{name}/ffn/linear_0")), self._linear(seen, f"{name}/ffn/linear_0_noact"))
            x = op.add(x, self._linear(gated, f"{name}/ffn/linear_1"))
        x = op.gather(self._norm(x, "decoder/layer_norm"), inputs["rows"], self._numbers(0))
        tied = self._tensors.get("decoder/projection/weight") is self._tensors["decoder/embeddings/weight"]
        logits = self._linear(x, "decoder/embeddings" if tied else "decoder/projection")
        known = self._used | {"decoder/projection/weight", "decoder/projection/weight_scale"} if tied else self._used
        if left := sorted(name for name, values in self._tensors.items() if values.shape and name not in known):
            raise ModelError(f"model.bin has {left[0]}, which a Llama-type model does not have", REMEDY)
        for name, node in inputs.items():
            node.get_output_tensor(0).set_names({name})
        return self._openvino.Model([op.result(logits)], list(inputs.values()), "llama")
