"""weights: GGUF and safetensors become the same clean folder; what is broken, incomplete or runs code is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.errors import ModelError
from stages.files import sha256
from stages.weights import clean
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers repository, its embedding tied."""
    return tiny_llama(tmp_path_factory.mktemp("base"), tied=True, digits=True)


def write_gguf(base: Path, path: Path) -> None:
    """The base as a float32 GGUF, as llama.cpp's converter writes it (query and key rows permuted for its rotary embedding)."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    merges = json.loads((base / "tokenizer.json").read_text())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    shape = model.config
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))])
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        value = tensor.detach().numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, block, *rest = name.split(".")
            part = ".".join(rest[:-1])
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = shape.num_attention_heads if part.endswith("q_proj") else shape.num_key_value_heads
                value = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{block}.{names[part]}.weight", np.ascontiguousarray(value))
        else:
            writer.add_tensor({"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name], value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy(base: Path, out: Path) -> list[Path]:
    """A copy of the base to be damaged; returns its files."""
    out.mkdir()
    for file in base.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return sorted(out.iterdir())


def test_safetensors_become_a_clean_folder(base: Path, tmp_path: Path) -> None:
    counted = clean(sorted(base.iterdir()), "safetensors", "bfloat16", tmp_path / "out")
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    assert counted == vocabulary * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 64) + 32
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert str(base) not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o044 == 0o044, "others must be able to read what is served"


def test_same_files_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        clean(copy(base, tmp_path / name), "safetensors", "float32", tmp_path / f"{name}-out")
    assert sha256(tmp_path / "one-out") == sha256(tmp_path / "two-out")


def test_gguf_gives_the_logits_and_tokens_of_the_original(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(base, tmp_path / "tiny.gguf")
    clean([tmp_path / "tiny.gguf"], "gguf", "float32", tmp_path / "out")
    ours, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base))
    ids = torch.arange(3, 43).reshape(2, 20)
    assert torch.equal(ours(ids).logits, original(ids).logits)
    assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr(), "the head must stay tied"
    tokens, known = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base))
    text = "Order  4711: where is it?\n\tThanks  42"
    assert tokens.encode(text) == known.encode(text)
    split, wanted = (t.backend_tokenizer.pre_tokenizer.pre_tokenize_str("tent 4711") for t in (tokens, known))
    assert [piece for piece, _ in split] == [piece for piece, _ in wanted] == ["tent", "Ġ", "4", "7", "1", "1"], "digits are split as in training"
    talk = [{"role": "user", "content": "Hello"}]
    assert tokens.apply_chat_template(talk, tokenize=False) == known.apply_chat_template(talk, tokenize=False)


def test_a_cut_gguf_is_refused(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "tiny.gguf")
    for share in (0.1, 0.5, 0.95):
        data = (tmp_path / "tiny.gguf").read_bytes()
        (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
        with pytest.raises(ModelError, match=r"cut\.gguf is no GGUF file"):
            clean([tmp_path / "cut.gguf"], "gguf", "float32", tmp_path / "out")
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(ModelError, match="no GGUF file"):
        clean([tmp_path / "page.gguf"], "gguf", "float32", tmp_path / "out")


def damage_weights(file: Path) -> None:
    """Cut the weights short."""
    (file / "model.safetensors").write_bytes((file / "model.safetensors").read_bytes()[:-100])


def poison(file: Path) -> None:
    """One weight is not a number."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file / "model.safetensors", {"format": "pt"})


def lose_a_tensor(file: Path) -> None:
    """One matrix is missing."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file / "model.safetensors", {"format": "pt"})


def add_a_tensor(file: Path) -> None:
    """A layer that config.json does not know of."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file / "model.safetensors")
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    save_file(tensors, file / "model.safetensors", {"format": "pt"})


def bring_code(file: Path) -> None:
    """The repository wants its own code run."""
    config = json.loads((file / "config.json").read_text())
    (file / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))


def pickle_weights(file: Path) -> None:
    """Weights as torch's archive."""
    (file / "pytorch_model.bin").write_bytes(b"PK\x03\x04rest")


def disguise(file: Path) -> None:
    """A pickle under the name of safetensors."""
    (file / "model.safetensors").write_bytes(b"\x80\x04\x95rest")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_weights, "cut short"),
        (poison, "NaN"),
        (lose_a_tensor, "1 tensors are missing"),
        (add_a_tensor, r"1 tensors have no place in the architecture.*such as model\.layers\.9\.mlp\.up_proj\.weight"),
        (bring_code, "auto_map"),
        (pickle_weights, "pytorch_model.bin is a pickle"),
        (disguise, "model.safetensors is a pickle"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_damaged_base_is_refused(base: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    copy(base, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(ModelError, match=reason):
        clean(sorted((tmp_path / "copy").iterdir()), "safetensors", "float32", tmp_path / "out")
    assert not (tmp_path / "out").exists()
