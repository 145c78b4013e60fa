"""GGUF files written by hand from small models, read back as sources."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import truedepth as td
from gguf_files import GGUF_TINY, interleave, write_gguf
from tiny_models import random_ids, random_model


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biases"],
)
def test_gguf_gives_transformers_tensors_and_logits(tmp_path, options):
    model = random_model(LlamaConfig(**GGUF_TINY | options))
    loaded = td.load(write_gguf(tmp_path / "model.gguf", model))
    assert loaded.source.quantization is None
    for name, tensor in loaded.source.tensors.items():
        assert torch.equal(tensor.read(), model.state_dict()[name])
    assert torch.equal(loaded.model(random_ids()).logits, model(random_ids()).logits)


def test_gguf_tokenizer_takes_digits_one_by_one(tmp_path):
    """SmolLM's split: a blank before a digit stays apart, so two blanks make one token."""
    model = random_model(LlamaConfig(**GGUF_TINY))
    tokenizer = td.open_source(write_gguf(tmp_path / "model.gguf", model)).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12")["input_ids"]) == ["a", "Ġ", "1", "2"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_types_are_dequantized_row_by_row(tmp_path, kind):
    quantization = getattr(gguf.GGMLQuantizationType, kind)
    model = random_model(LlamaConfig(**GGUF_TINY))
    source = td.open_source(write_gguf(tmp_path / "model.gguf", model, quantization))
    assert source.quantization == (None if kind.endswith("16") else kind)
    for name, tensor in source.tensors.items():
        original = model.state_dict()[name]
        if original.ndim == 1:
            assert torch.equal(tensor.read(), original)
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        values = interleave(original.numpy(), heads) if heads else original.numpy()
        stored = gguf.quantize(values, quantization)
        back = gguf.dequantize(stored.reshape(len(values), -1), quantization)
        if heads:  # undo by the definition of the inverse, not by our code's index
            order = interleave(np.arange(len(values))[:, None], heads)[:, 0]
            expected = np.empty_like(back)
            expected[order] = back
        else:
            expected = back
        got = torch.cat(list(tensor.blocks(1000))).float().numpy()
        np.testing.assert_array_equal(got, expected.reshape(got.shape))


def test_gguf_converts_like_a_directory(tmp_path):
    model = random_model(LlamaConfig(**GGUF_TINY))
    path = write_gguf(tmp_path / "model.gguf", model)
    model.save_pretrained(tmp_path / "directory")
    plan = td.Plan(3, [[0, 1]])
    td.convert(path, tmp_path / "out", plan)
    expected = td.open_source(tmp_path / "directory")
    td.convert(expected, tmp_path / "out2", plan)
    one, two = (td.open_source(tmp_path / name).tensors for name in ("out", "out2"))
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(one[name].read(), two[name].read())
    tokenizer = td.load(tmp_path / "out").tokenizer
    assert tokenizer("a 12")["input_ids"] == td.open_source(path).tokenizer("a 12").input_ids


def llama3_config(factor=8.0):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(**GGUF_TINY | {"rope_parameters": scaling, "head_dim": 64})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rope_factors_become_llama3_scaling(tmp_path, factor):
    model = random_model(llama3_config(factor))
    # What llama.cpp stores are the factors by which plain frequencies are divided.
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    factors = plain / model.model.rotary_emb.inv_freq.numpy()
    source = td.open_source(write_gguf(tmp_path / "m.gguf", model, rope_factors=factors))
    assert source.config["rope_parameters"]["factor"] == pytest.approx(factor)
    logits = td.load(source).model(random_ids(length=200)).logits
    torch.testing.assert_close(logits, model(random_ids(length=200)).logits, atol=1e-4, rtol=0)


def test_gguf_of_other_scaling_is_refused(tmp_path):
    model = random_model(llama3_config())
    path = write_gguf(tmp_path / "m.gguf", model, rope_factors=np.linspace(1, 3, 32))
    with pytest.raises(td.TruedepthError, match="scales RoPE"):
        td.open_source(path)


def test_other_architectures_and_missing_tensors_are_refused(tmp_path):
    model = random_model(LlamaConfig(**GGUF_TINY))
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(td.TruedepthError, match="'falcon'"):
        td.open_source(tmp_path / "falcon.gguf")
    incomplete = write_gguf(tmp_path / "less.gguf", model, skip=["blk.0.attn_q.weight"])
    with pytest.raises(td.TruedepthError, match=r"lacks|Only some"):
        td.convert(incomplete, tmp_path / "out", td.Plan(3, [[0, 1]]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file that is as it should be."""
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    return write_gguf(path, random_model(LlamaConfig(**GGUF_TINY))).read_bytes()


def after(data, name, skipped=0):
    """The place behind a name, and so many bytes."""
    return data.index(name) + len(name) + skipped


def patched(data, at, number):
    """Bytes with another 32-bit number at a place."""
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


FIRST = b"blk.0.ffn_up.weight"
BROKEN = {
    "nothing": (lambda data: b"", "is not a GGUF file: it is empty"),
    "noise": (lambda data: b"\xff" * 5000, r"is not a GGUF file: it begins with b'.xff"),
    "old format": (lambda data: b"tjgg" + data, "is not a GGUF file: it begins with b'tjgg"),
    "pointer": (
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pointer of Git LFS .*git lfs pull",
    ),
    "version 1": (lambda data: patched(data, 4, 1), "of version 1, but only versions 2 and 3"),
    "version 4": (lambda data: patched(data, 4, 4), "of version 4, but only"),
    "big-endian": (lambda data: patched(data, 4, 3 << 24), "big-endian.*gguf-convert-endian"),
    "cut in the magic": (lambda data: data[:6], "truncated: it ends at byte 6, and its header"),
    "cut in metadata": (
        lambda data: data[: after(data, b"llama.block_count", 6)],
        "ends at byte .*'llama.block_count' would end at byte",
    ),
    "cut in tensors' names": (
        lambda data: data[: after(data, FIRST, 7)],
        "truncated: .*the header of the tensor 'blk.0.ffn_up.weight' would end",
    ),
    "cut in tensors": (lambda data: data[:-5000], "truncated: it ends at byte .*the tensor '"),
    "type of metadata": (
        lambda data: patched(data, after(data, b"llama.block_count"), 99),
        "'llama.block_count' has a value of type 99, which GGUF does not define",
    ),
    "type of a tensor": (
        lambda data: patched(data, after(data, FIRST, 4 + 2 * 8), 139),
        "holds the tensor 'blk.0.ffn_up.weight' in the type 139, which .* does not know",
    ),
    "type that was removed": (
        lambda data: patched(data, after(data, FIRST, 4 + 2 * 8), 31),
        "in the type 31, which",
    ),
    "dimensions": (
        lambda data: patched(data, after(data, FIRST), 9),
        "the tensor 'blk.0.ffn_up.weight' has 9 dimensions",
    ),
    "no architecture": (
        lambda data: data.replace(b"general.architecture", b"general.architectura"),
        "lacks the metadata 'general.architecture'",
    ),
    "two tensors of a name": (
        lambda data: data.replace(b"blk.1.ffn_up.weight", FIRST),
        "not a valid GGUF file: .*blk.0.ffn_up.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_said(tmp_path, whole, name):
    change, words = BROKEN[name]
    (tmp_path / "m.gguf").write_bytes(change(whole))
    with pytest.raises(td.TruedepthError, match=f"m.gguf.*{words}") as said:
        td.open_source(tmp_path / "m.gguf")
    assert ("truncated" in str(said.value)) == name.startswith("cut")
    assert "\n" not in str(said.value)


def test_split_and_partly_rotated_gguf_files_are_refused(tmp_path):
    for key, words in [("split.count", "parts"), ("llama.rope.dimension_count", "RoPE to a part")]:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        for name, value in [("embedding_length", 64), ("attention.head_count", 4)]:
            writer.add_uint32(f"llama.{name}", value)
        writer.add_uint32(key, 2)
        writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(td.TruedepthError, match=words):
            td.open_source(tmp_path / "model.gguf")
