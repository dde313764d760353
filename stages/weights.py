"""Any base -> one clean folder: safetensors in one dtype, tokenizer, chat template, generation settings, and nothing that runs code.

Refused: pickles, code of the repository's own (`auto_map`), files that are cut short, missing or surplus tensors, numbers that are
not finite, a base without a fast tokenizer, an end token or a chat template.
"""

from __future__ import annotations

import functools
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conf.errors import DataError, ModelError
from conf.schema import Dtype
from stages.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How torch's archives and pickles begin."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""What they are called."""
ANEW = "compare its digest with the publisher's, and fetch it anew"
PLACES = ("_name_or_path", "_model_name_or_path", "_commit_hash", "name_or_path", "quantization_config", "is_local", "local_files_only", "tokenizer_file")
"""Keys of a configuration that say where it was loaded from, or how it was packed."""
SMOLLM = "smollm"
"""GGUF's name of a pre-tokenizer that splits digits; transformers reads the vocabulary, but not that name."""


def clean(files: Sequence[Path], form: Literal["gguf", "safetensors"], dtype: Dtype, out: Path) -> int:
    """Write a base as a clean folder.

    Args:
        files: What was fetched: the one GGUF file, or the files of a transformers repository.
        form: Their format.
        dtype: Type of the weights written.
        out: Folder to write.

    Returns:
        Number of parameters (a tied embedding counts once).

    Raises:
        ModelError: one of the things above; names the file.
    """
    for file in files:
        refuse_pickle(file)
    model, tokenizer = load_gguf(files) if form == "gguf" else load_safetensors(files)
    return save(model, tokenizer, dtype, out)


def refuse_pickle(file: Path) -> None:
    """Stop at a file that would run code when it is loaded, by name or by content.

    Raises:
        ModelError: it is a pickle.
    """
    with file.open("rb") as opened:
        head = opened.read(4)
    if file.suffix.lower() in PICKLES or head.startswith(PICKLED):
        raise ModelError(f"{file.name} is a pickle, which can run code when loaded", "take the safetensors or GGUF weights of the same model")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice from transformers and datasets: what is wrong is raised."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as hf

    level, bars, mapping = hf.get_verbosity(), hf.is_progress_bar_enabled(), not are_progress_bars_disabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # for those who maintain trl
            yield
    finally:
        hf.set_verbosity(level)
        hf.enable_progress_bar() if bars else None
        enable_progress_bars() if mapping else None


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once: it does so anew for tokenizer, configuration and weights, and lists the names anew for each module."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, call in kept.items():
        setattr(gguf, name, functools.cache(call))
    try:
        yield
    finally:
        for name, call in kept.items():
            setattr(gguf, name, call)


def load_gguf(files: Sequence[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file as a plain float32 model: a model as loaded from GGUF can be neither saved nor tuned.

    Raises:
        ModelError: there is not exactly one file, it is no GGUF, cut short, or of an architecture that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if len(files) != 1:
        raise ModelError(f"{len(files)} files for a GGUF base: {', '.join(f.name for f in files) or 'none'}", "name exactly one file in the candidate's origin")
    folder, name = files[0].parent, files[0].name
    try:
        with quiet(), parsed_once():
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
            packed, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:  # what transformers and gguf raise for a broken file
        raise ModelError(f"{name} is no GGUF file that transformers can read: {error}", ANEW) from error
    refuse_gaps(name, loading)
    if pre_tokenizer(files[0]) == SMOLLM:
        split_digits(tokenizer)
    with quiet():
        plain = type(packed).from_pretrained(None, config=plain_config(packed.config), state_dict=packed.state_dict(), dtype=torch.float32)
    plain.generation_config = packed.generation_config
    return plain, tokenizer


def pre_tokenizer(file: Path) -> str:
    """GGUF's name of how text is split before BPE."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    return str(read_gguf_metadata(str(file))[0].get("tokenizer.ggml.pre", ""))


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Split digits one by one before bytes, as the model was trained."""
    from tokenizers import pre_tokenizers as pre

    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The architecture alone, without where it came from."""
    return type(config).from_dict({key: value for key, value in config.to_dict().items() if key not in PLACES})


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a base.

    Raises:
        ModelError: it is none.
    """
    try:
        value = read_json(file)
    except DataError as error:
        raise ModelError(f"{file.name} is no JSON: {error.what}", ANEW) from error
    if not isinstance(value, dict):
        raise ModelError(f"{file.name} holds a {type(value).__name__}, not an object", ANEW)
    return value


def check_tokenizer(file: Path) -> None:
    """Read a tokenizer.json.

    Raises:
        ModelError: it is none.
    """
    from tokenizers import Tokenizer

    if "model" not in read_object(file):
        raise ModelError(f"{file.name} holds no tokenizer", ANEW)
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelError(f"{file.name} holds no tokenizer: {error}", ANEW) from error


def load_safetensors(files: Sequence[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers repository with safetensors, of an architecture that transformers itself has.

    Raises:
        ModelError: a file is missing, damaged or cut short, or the repository brings its own code.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    configs = [file for file in files if file.name == "config.json"]
    if not configs:
        raise ModelError(f"no config.json among {len(files)} files", "fetch the whole repository of the base")
    folder = min(configs, key=lambda f: len(f.parts)).parent
    if "auto_map" in read_object(folder / "config.json"):
        raise ModelError("config.json names code of the repository's own (auto_map), which is never run", "choose a base whose architecture transformers has")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError("the base has no tokenizer.json", "fetch the whole repository; a slow tokenizer alone cannot be served")
    check_tokenizer(folder / "tokenizer.json")
    weights = [file for file in files if file.suffix == ".safetensors" and file.parent == folder]
    index = folder / "model.safetensors.index.json"
    listed = read_object(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ModelError(f"{index.name} names no files of weights", ANEW)
    wanted = set(listed.values())
    if missing := wanted - {file.name for file in weights}:
        raise ModelError(f"the base has no {', '.join(sorted(missing))}", "fetch the whole repository; pickled weights are not taken instead")
    try:
        for file in weights:
            with safe_open(file, framework="pt"):
                pass
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,  # refuse_gaps tells them
            )  # fmt: skip
    except SafetensorError as error:
        raise ModelError(f"{file.name} is cut short or damaged: {error}", ANEW) from error
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # transformers' for a wrong config
        raise ModelError(
            f"config.json, tokenizer and weights do not make a model: {' '.join(str(error).split())[:500]}",
            f"choose a base whose architecture transformers has; if it has this one, {ANEW}",
        ) from error
    refuse_gaps(folder.name, loading)
    return model, tokenizer


def refuse_gaps(name: str, loading: dict[str, set[str]]) -> None:
    """Hold the tensors of a file against those of its architecture: transformers fills a gap with random numbers, and leaves out a surplus.

    Raises:
        ModelError: tensors are missing, or of another shape, or have no place in the architecture.
    """
    gaps = sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))
    if gaps:
        raise ModelError(f"{name}: {len(gaps)} tensors are missing or of a wrong shape, such as {gaps[0]}", "fetch it anew, or choose another base")
    surplus = sorted(map(str, loading["unexpected_keys"]))
    if surplus:
        raise ModelError(
            f"{name}: {len(surplus)} tensors have no place in the architecture that config.json names, such as {surplus[0]}",
            "a part of the model would be left out: fetch it anew, or choose another base",
        )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: Dtype, out: Path) -> int:
    """Write model and tokenizer as a clean folder; returns the number of parameters.

    Raises:
        ModelError: a weight is not finite, there is no chat template or end token, or the embedding has no row for a token.
    """
    import torch

    if tokenizer.chat_template is None:
        raise ModelError("the base has no chat template", "choose an instruction-tuned base, or one with chat_template.jinja")
    if tokenizer.eos_token is None:
        raise ModelError("the base's tokenizer names no end token", "choose a base whose tokenizer_config.json has eos_token")
    rows, last = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ModelError(
            f"the tokenizer has a token {last}, and the embedding {rows} rows", "they are not of one model: fetch both anew, or choose another base"
        )
    broken = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"{len(broken)} tensors hold NaN or infinite numbers, such as {broken[0]}",
            "a base: fetch it anew, or choose another; after training: lower the learning rate",
        )
    out.mkdir(parents=True, exist_ok=True)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and tokenizer.model_max_length > context:
        tokenizer.model_max_length = context
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config = plain_config(model.config)
    model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size="50GB")
    tokenizer.save_pretrained(out)
    strip_places(out)
    return sum(parameter.numel() for parameter in model.parameters())


def strip_places(folder: Path) -> None:
    """Take out of the JSON files of a model folder where it was loaded from, and make them canonical."""
    for file in sorted(folder.iterdir()):
        file.chmod(0o644)  # safetensors writes for the owner alone; a served model is read by another user
        if file.suffix == ".json" and file.name != "tokenizer.json":
            value = read_json(file)
            write_json(file, {key: item for key, item in value.items() if key not in PLACES} if isinstance(value, dict) else value)
