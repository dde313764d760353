"""Write a Llama-type model as the GGUF file that llama.cpp runs.

The file holds weights and the numbers of the architecture. It has no tokenizer: the engine gives token ids, and tokenizer and chat template stay
the files beside it, as with every engine. The same weights give the same bytes on every machine: the 8-bit blocks are computed in float32 by
the package gguf, which publishes llama.cpp's formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ModelError
from stages.convert import copy_tokenizer
from stages.files import publish, read_json
from stages.serve.materialise import Weights

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

MODEL = "model.gguf"
TYPES = {"q8_0": "Q8_0", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""`serve.engine.quantization` -> GGUF's name of the type of the matrices; vectors are always float32."""
ACCEPTED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None), "rope_scaling": (None,),
}  # fmt: skip
"""Keys of config.json, and the values with which the model is what is written here."""
REMEDY = "choose another base, or serve: ctranslate2"


def to_gguf(folder: Path, out: Path, quantization: str, describe: Callable[[GGUFWriter], None] | None = None) -> None:
    """Write `out/model.gguf` and copy tokenizer, chat template and generation config, whole or not at all.

    Args:
        folder: a Hugging Face folder with safetensors of any float type.
        quantization: a key of TYPES.
        describe: adds what else the file shall hold: a tokenizer, for other programs.

    Raises:
        ModelError: it is no model of this type, a tensor is not known, or its rows do not fit into blocks.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    config, weights = read_json(folder / "config.json"), Weights(folder, None)
    shape, theta = architecture(config, folder)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, shape["block_count"])
    with publish(out) as fresh:
        fresh.mkdir()
        writer = GGUFWriter(fresh / MODEL, "llama")
        for key, number in shape.items():
            writer.add_uint32(f"llama.{key}", number)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(theta)
        if describe is None:
            writer.add_tokenizer_model("none")
        else:
            describe(writer)
        matrices = GGMLQuantizationType[TYPES[quantization]]
        for name in weights.names:
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            theirs = names.get_name(name, try_suffixes=(".weight",))
            if theirs is None:
                raise ModelError(f"{folder} holds {name}, which GGUF's Llama does not have", REMEDY)
            values = weights.whole(name)
            for part, count in (("q_proj", shape["attention.head_count"]), ("k_proj", shape["attention.head_count_kv"])):
                if name.endswith(f"{part}.weight"):
                    values = interleaved(values, count)
            add(writer, theirs, values, matrices if values.ndim > 1 else GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        copy_tokenizer(folder, fresh)


def architecture(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], float]:
    """The numbers of the architecture by their GGUF key, and the base of the rotary frequencies.

    Raises:
        ModelError: it is not a plain Llama.
    """
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    found = {key: config[key] for key in ACCEPTED if key in config} | {"rope_type": rope.get("rope_type", "default")}
    for key, value in found.items():
        if value not in (accepted := ACCEPTED.get(key, ("default",))):
            raise ModelError(f"{folder / 'config.json'}: {key} is {value!r}; for llama.cpp it must be {accepted[0]!r}", REMEDY)
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    shape = {
        "vocab_size": config["vocab_size"], "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"], "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads, "attention.key_length": size, "attention.value_length": size,
        "rope.dimension_count": size,
    }  # fmt: skip
    return shape, float(rope["rope_theta"])


def interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key matrix in llama.cpp's order: the two rotary halves of each head take turns."""
    rows = len(values)
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def add(writer: GGUFWriter, name: str, values: NDArray[np.float32], kind: Any) -> None:
    """Add one tensor in its type.

    Raises:
        ModelError: its rows do not fit into blocks of that type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    if values.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        what = f"{name} has rows of {values.shape[-1]} numbers; {kind.name} takes multiples of {GGML_QUANT_SIZES[kind][0]}"
        raise ModelError(what, "set serve.engine.quantization: float32")
    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
