"""GGUF files of layer-parallel checkpoints: what is in them. Needs no llama.cpp."""

import json
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import MistralConfig, Qwen2Config
from typer.testing import CliRunner

import truedepth as td
from gguf_files import (
    GGUF_NAMES,
    LLAMA3,
    MODELS,
    PAIRS,
    converted,
    interleave,
    sentencepiece,
    smollm,
    with_words,
    write_gguf,
)
from tiny_models import byte_tokenizer
from truedepth.cli.app import app
from truedepth.engines.gguf import export as exporter
from truedepth.files.atomic import atomic_file
from truedepth.sources.gguf.words import WORDS, canonical, published


@pytest.fixture(scope="session", params=MODELS)
def checkpoint(request, make_model, tmp_path_factory):
    """A converted model of every kind."""
    return converted(make_model, tmp_path_factory.mktemp("export"), *MODELS[request.param])


@pytest.fixture
def pairs(make_model, tmp_path):
    return converted(make_model, tmp_path, {}, PAIRS)


def test_what_is_read_back_is_the_checkpoint(checkpoint, tmp_path):
    done = td.export(checkpoint, tmp_path / "out.gguf")
    assert done.type == "f32" and done.size == (tmp_path / "out.gguf").stat().st_size
    before, after = td.open_source(checkpoint), td.open_source(tmp_path / "out.gguf")
    assert after.config == before.config
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name].read(), tensor.read()), name
    text = "the cat sat\n on <end> the 123 hats"
    assert after.tokenizer(text) == before.tokenizer(text)


def test_rows_and_names_are_llama_cpps(checkpoint, tmp_path):
    """Against a conversion written out in NumPy."""
    td.export(checkpoint, tmp_path / "out.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    config = json.loads((checkpoint / "config.json").read_text())
    found.pop("rope_freqs.weight", None)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.numpy()
        parts = name.split(".")
        if parts[1] == "layers":
            layer = int(parts[2])
            heads = {
                "q_proj": config["num_attention_heads"] * config["layer_widths"][layer],
                "k_proj": config["num_key_value_heads"] * config["layer_widths"][layer],
            }
            if parts[-2] in heads:
                values = interleave(values, heads[parts[-2]])
            name = f"blk.{layer}.{GGUF_NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
        else:
            name = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        stored = found.pop(name)
        assert np.array_equal(stored.data, values), name
        assert [*reversed(stored.shape)] == [*values.shape]
    assert not found


def test_metadata_is_complete(checkpoint, tmp_path):
    td.export(checkpoint, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    held = {name: field.contents() for name, field in fields.items()}
    config = json.loads((checkpoint / "config.json").read_text())
    widths = config["layer_widths"]
    for key, name in (
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("feed_forward_length", "intermediate_size"),
    ):
        assert held[f"deci.{key}"] == [config[name] * width for width in widths]
        assert fields[f"deci.{key}"].types == [
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.INT32,
        ]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert held[f"deci.{key}"] == config["head_dim"]
    assert held["deci.block_count"] == len(widths)
    assert held["deci.embedding_length"] == config["hidden_size"]
    assert held["deci.context_length"] == config["max_position_embeddings"]
    assert held["deci.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    assert held["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert held["general.architecture"] == "deci" and held["general.file_type"] == 0
    assert len(held["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert held["tokenizer.ggml.model"] == "gpt2" and held["tokenizer.ggml.pre"] == "gpt-2"
    assert held["tokenizer.ggml.eos_token_id"] == 0
    assert held["tokenizer.ggml.add_bos_token"] is False


def test_llama3_frequencies(make_model, tmp_path):
    checkpoint = converted(make_model, tmp_path, {"rope_parameters": LLAMA3}, PAIRS)
    td.export(checkpoint, tmp_path / "out.gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    blend = np.clip((256 / wavelengths - 1) / (4 - 1), 0, 1)
    assert np.allclose(tensors["rope_freqs.weight"], 1 / ((1 - blend) / 8 + blend), rtol=1e-5)
    assert len(set(tensors["rope_freqs.weight"].round(3))) > 1


QUANTIZED = {"q8_0": 0.01, "q5_1": 0.06, "q5_0": 0.07, "q4_1": 0.12, "q4_0": 0.13}


@pytest.mark.parametrize("kind", ["f16", "bf16", *QUANTIZED])
def test_types(make_model, pairs, kind, tmp_path):
    done = td.export(pairs, tmp_path / "out.gguf", type=kind.upper())
    assert done.type == kind
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    file_type = gguf.LlamaFileType(reader.fields["general.file_type"].contents())
    assert file_type.name == f"MOSTLY_{kind.upper()}"
    for tensor in reader.tensors:
        expected = kind.upper() if tensor.name.endswith("weight") else "F32"
        if "norm" in tensor.name:
            expected = "F32"
        elif tensor.name in ("token_embd.weight", "output.weight") and kind in QUANTIZED:
            expected = "Q8_0"
        assert tensor.tensor_type.name == expected, tensor.name
    before, after = td.open_source(pairs), td.open_source(tmp_path / "out.gguf")
    written = exporter.balanced_tensors(before) if kind in QUANTIZED else before.tensors
    for name, tensor in written.items():
        whole, rounded = tensor.read(), after.tensors[name].read().float()
        error = ((whole - rounded).norm() / whole.norm()).item()
        assert error <= QUANTIZED.get(kind, 0.003), name
        if len(whole.shape) > 1:
            assert error > 0
    assert (after.quantization is None) == (kind not in QUANTIZED)


def test_the_checkpoints_own_type_is_the_default(make_model, tmp_path):
    for dtype, kind in ((torch.float16, "F16"), (torch.bfloat16, "BF16")):
        directory = tmp_path / kind
        directory.mkdir()
        checkpoint = converted(make_model, directory, {}, PAIRS, {"dtype": dtype})
        done = td.export(checkpoint, directory / "out.gguf")
        assert done.type == kind.lower() and done.tensors[kind] == 4 * 7 + 2
        before, after = td.open_source(checkpoint), td.open_source(directory / "out.gguf")
        for name, tensor in before.tensors.items():
            assert torch.equal(after.tensors[name].read().float(), tensor.read().float())


def test_blocks_of_any_size_give_the_same_file(pairs, tmp_path, monkeypatch):
    td.export(pairs, tmp_path / "whole.gguf", type="q8_0")
    monkeypatch.setattr(exporter, "BLOCK_BYTES", 1)
    td.export(pairs, tmp_path / "rows.gguf", type="q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "rows.gguf").read_bytes()


def test_only_a_block_is_in_memory(pairs, tmp_path, monkeypatch):
    """The largest matrix is read in pieces."""
    sizes = []
    write = exporter._write_block
    monkeypatch.setattr(exporter, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(
        exporter,
        "_write_block",
        lambda file, name, block, kind: (
            sizes.append(block.nbytes) or write(file, name, block, kind)
        ),
    )
    td.export(pairs, tmp_path / "out.gguf")
    assert max(sizes) <= 4096 < 64 * 320 * 4


def test_a_gguf_source_goes_in_and_out(make_model, tmp_path):
    """A quantized source is dequantized once, and the file holds just that."""
    original = td.load(make_model(tie_word_embeddings=True)).model
    write_gguf(tmp_path / "in.gguf", original, gguf.GGMLQuantizationType.Q8_0)
    said = CliRunner().invoke(
        app, ["convert", str(tmp_path / "in.gguf"), str(tmp_path / "out"), "--layers", "2-5"]
    )
    assert said.exit_code == 0 and "from Q8_0" in said.output
    td.export(tmp_path / "out", tmp_path / "out.gguf")
    before, after = td.open_source(tmp_path / "in.gguf"), td.open_source(tmp_path / "out.gguf")
    for layer, now in ((0, 0), (1, 1)):
        for name, tensor in before.tensors.items():
            if name.startswith(f"model.layers.{layer}."):
                moved = name.replace(f".{layer}.", f".{now}.", 1)
                assert torch.equal(after.tensors[moved].read(), tensor.read())
    said = CliRunner().invoke(app, ["info", str(tmp_path / "out.gguf")])
    assert said.exit_code == 0 and "[2+3] [4+5]" in said.output
    assert "Q8_0" in CliRunner().invoke(app, ["info", str(tmp_path / "in.gguf")]).output


def test_a_chat_template_goes_along(pairs, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (pairs / "chat_template.jinja").write_text(template)
    td.export(pairs, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template
    assert td.open_source(tmp_path / "out.gguf").tokenizer.chat_template == template


# Tokenizers


@pytest.mark.parametrize("name", canonical())
def test_splits_into_words_are_recognised(pairs, name, tmp_path):
    """Those of published tokenizers, and those that GGUF files have become here."""
    for patterns in (published(name), WORDS[name].patterns):
        with_words(name, patterns).save_pretrained(pairs)
        td.export(pairs, tmp_path / "out.gguf", force=True)
        fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == name


def test_bytes_without_tokens_go_in_and_out(make_model, tmp_path):
    """A file whose vocabulary lacks some, as SmolLM's does."""
    fields = smollm(320)
    lost = fields["tokenizer.ggml.tokens"][9]
    fields["tokenizer.ggml.tokens"][9] = "[lost]"
    fields["tokenizer.ggml.merges"].remove(f"Ġ {lost}")
    original = td.load(make_model()).model
    write_gguf(tmp_path / "in.gguf", original, fields=fields)
    td.convert(tmp_path / "in.gguf", tmp_path / "out", td.Plan(6, [[0, 1]]))
    td.export(tmp_path / "out", tmp_path / "out.gguf")
    names = gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert names == fields["tokenizer.ggml.tokens"]


def test_tokens_that_end_a_turn(make_model, tmp_path, capsys):
    """llama.cpp has two places for them, and finds those of usual names by itself."""
    checkpoint = converted(make_model, tmp_path, {"vocab_size": 324}, PAIRS)
    tokenizer, names = byte_tokenizer(), ["<|eot_id|>", "<a>", "<b>", "<c>"]
    tokenizer.add_special_tokens({"extra_special_tokens": names})
    tokenizer.save_pretrained(checkpoint)
    usual, a, b, c = tokenizer.convert_tokens_to_ids(names)
    for ends, eot, eom in (
        ([0], None, None),
        ([0, usual], usual, None),
        ([0, usual, a], a, None),
        ([a, 0, b, c], a, b),
    ):
        defaults = json.dumps({"eos_token_id": ends})
        (checkpoint / "generation_config.json").write_text(defaults)
        td.export(checkpoint, tmp_path / "out.gguf", force=True)
        fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
        found = {name: field.contents() for name, field in fields.items()}
        assert found["tokenizer.ggml.eos_token_id"] == 0
        assert found.get("tokenizer.ggml.eot_token_id") == eot
        assert found.get("tokenizer.ggml.eom_token_id") == eom
    assert f"also ends texts with token {c} ('<c>')" in capsys.readouterr().err


def test_qwen2s_normalizer_is_left_out_and_others_are_refused(pairs, tmp_path):
    tokenizer = with_words("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(pairs)
    td.export(pairs, tmp_path / "out.gguf")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(pairs)
    refused(pairs, "cannot be exported: llama")
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(pairs)
    refused(pairs, "cannot be exported: llama")


def test_words_that_are_tokens(pairs, tmp_path):
    """Llama 3 takes them whole, DBRX with the same split does not, and Qwen2 never does."""
    tokenizer = with_words("llama-bpe")
    tokenizer.backend_tokenizer.model = with_words("qwen2").backend_tokenizer.model
    tokenizer.save_pretrained(pairs)
    td.export(pairs, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "dbrx"
    tokenizer = with_words("qwen2")
    tokenizer.backend_tokenizer.model = with_words("llama-bpe").backend_tokenizer.model
    tokenizer.save_pretrained(pairs)
    refused(pairs, "cannot be exported: llama")


def test_special_tokens_that_only_the_config_names(pairs, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(pairs)
    edited(pairs, bos_token_id=7, eos_token_id=[5, 6])
    td.export(pairs, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 7
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 5
    refused(edited(pairs, eos_token_id=None), "names the token that ends a text")


def test_chat_templates_by_name(pairs, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(pairs)
    td.export(pairs, tmp_path / "out.gguf")
    read = td.open_source(tmp_path / "out.gguf").tokenizer.chat_template
    assert read == tokenizer.chat_template


def test_sentencepiece(pairs, tmp_path):
    sentencepiece().save_pretrained(pairs)
    td.export(pairs, tmp_path / "out.gguf")
    held = {
        name: field.contents()
        for name, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()
        if name.startswith("tokenizer.")
    }
    assert held["tokenizer.ggml.model"] == "llama"
    tokens, types = held["tokenizer.ggml.tokens"], held["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, held["tokenizer.ggml.scores"], strict=True))
    assert [types[tokens.index(token)] for token in ("<unk>", "<s>", "<0x0A>", "▁the")] == [
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
        gguf.TokenType.NORMAL,
    ]
    assert types[-1] == gguf.TokenType.UNUSED and tokens[-1] == "[PAD319]"
    assert scores["he"] > scores["the"] > scores["▁the"] > scores["▁cat"] > scores["h"]
    assert held["tokenizer.ggml.add_bos_token"] and held["tokenizer.ggml.add_space_prefix"]
    assert "tokenizer.ggml.merges" not in held


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(False)]
            ),
        ),
    ],
)
def test_tokenizers_that_llama_cpp_has_not(pairs, change, tmp_path):
    tokenizer = byte_tokenizer()
    change(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(pairs)
    with pytest.raises(td.TruedepthError, match="cannot be exported: llama"):
        td.export(pairs, tmp_path / "out.gguf")


# What is refused


def refused(checkpoint, words, out=None, **options):
    out = out or checkpoint.parent / "refused.gguf"
    before = sorted(out.parent.iterdir())
    with pytest.raises(td.TruedepthError, match=words):
        td.export(checkpoint, out, **options)
    assert sorted(out.parent.iterdir()) == before


def edited(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return checkpoint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "its activation is SiLU, not gelu"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE scaling of type 'linear' differently",
        ),
    ],
)
def test_details_that_deci_has_not(pairs, changes, words):
    refused(edited(pairs, **changes), words)


@pytest.mark.parametrize(
    "options",
    [
        {"family": MistralConfig, "sliding_window": 64},
        {
            "family": Qwen2Config,
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 0,
        },
    ],
)
def test_sliding_windows(make_model, options, tmp_path):
    refused(converted(make_model, tmp_path, options, PAIRS), "no sliding window.* 64 tokens back")


@pytest.mark.parametrize("kind", ["auto", "q4_k_m"])
def test_stages_of_sublayers(make_model, tmp_path, monkeypatch, kind):
    """Refused by the config alone, before weights are read and a quantizer is looked for."""
    td.convert(make_model(), tmp_path / "out", td.Plan(6, [[0, 1]], stages=[["F2", "A3"]]))
    monkeypatch.setattr("truedepth.runtime.llama_cpp.library", None)
    monkeypatch.setattr("truedepth.sources.source.Source.tensors", None)
    words = r"stages of sub-layers such as \[F2 A3\], .* truedepth convert MODEL OUT --form pairs"
    refused(tmp_path / "out", words, type=kind)


def test_norms_of_single_heads(pairs):
    """As Qwen3 has them."""
    tensors = load_file(pairs / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, pairs / "model.safetensors", metadata={"format": "pt"})
    edited(pairs, model_type="truedepth_qwen3")
    refused(pairs, "no place for self_attn.q_norm.weight")


def test_another_family(pairs):
    refused(edited(pairs, model_type="truedepth_gemma"), "family 'gemma'")


def test_a_tensor_too_many(pairs):
    tensors = load_file(pairs / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.scale"] = torch.ones(1)
    save_file(tensors, pairs / "model.safetensors", metadata={"format": "pt"})
    refused(pairs, "q_proj.scale")


def test_values_beyond_float16(pairs):
    tensors = load_file(pairs / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, pairs / "model.safetensors", metadata={"format": "pt"})
    refused(pairs, "blk.0.ffn_up.weight has values that are not finite in f16", type="f16")
    td.export(pairs, pairs.parent / "out.gguf", type="bf16")


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_values_that_are_no_numbers(pairs, kind):
    tensors = load_file(pairs / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, pairs / "model.safetensors", metadata={"format": "pt"})
    refused(pairs, "values that are not finite", type=kind)


def test_a_matrix_of_another_type_is_not_rounded(make_model, tmp_path):
    checkpoint = converted(make_model, tmp_path, {}, PAIRS, {"dtype": torch.bfloat16})
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(tensors["lm_head.weight"].shape)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert td.export(checkpoint, tmp_path / "out.gguf").type == "f32"


def test_rows_that_blocks_do_not_divide(make_model, tmp_path):
    checkpoint = converted(make_model, tmp_path, {"intermediate_size": 80}, [[0, 1]])
    refused(
        checkpoint,
        r"q8_0 packs blocks of 32 columns, but blk.1.ffn_down.weight has 80",
        type="q8_0",
    )
    td.export(checkpoint, tmp_path / "out.gguf", type="f16")


def test_bad_input(make_model, pairs, tmp_path, monkeypatch):
    refused(pairs, "'q9_9' is not a type; choose from auto, f32", type="q9_9")
    refused(make_model(), "not a layer-parallel checkpoint", tmp_path / "x.gguf")
    refused(pairs, "must end in .gguf", tmp_path / "out.bin")
    td.export(pairs, tmp_path / "out.gguf")
    refused(pairs, "--force", tmp_path / "out.gguf")
    refused(tmp_path / "out.gguf", "is already a GGUF file", tmp_path / "again.gguf")
    td.export(pairs, tmp_path / "out.gguf", force=True)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    refused(pairs, r"pip install 'truedepth\[gguf\]'", type="q4_k_m")
    with pytest.raises(td.TruedepthError, match=r"pip install 'truedepth\[gguf\]'"):
        td.load(tmp_path / "out.gguf")
    shutil.rmtree(pairs)
    refused(pairs, "no model at", tmp_path / "new.gguf")


def test_a_deci_file_of_another_program(pairs, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "deci")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(td.TruedepthError, match="not exported by truedepth"):
        td.open_source(tmp_path / "other.gguf")


def test_the_command(pairs, tmp_path):
    out = tmp_path / "out.gguf"
    command = ["export", str(pairs), str(out), "--type", "Q8_0", "--json", str(tmp_path / "j")]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0 and "q8_0 (tensors:" in said.output
    found = json.loads((tmp_path / "j").read_text())
    assert found["size"] == out.stat().st_size and found["tensors"]["Q8_0"] == 4 * 7 + 2
    assert CliRunner().invoke(app, [*command[:4], "q9"]).exit_code == 2


def test_dtype_is_a_type_too(pairs, tmp_path):
    command = ["export", str(pairs), str(tmp_path / "out.gguf"), "--dtype", "bfloat16"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0 and "bf16 (tensors:" in said.output
    said = CliRunner().invoke(app, [*command, "--type", "q8_0", "--force"])
    assert "give one of them" in str(said.exception)


def test_an_atomic_file(tmp_path):
    with atomic_file(tmp_path / "out.gguf") as partial:
        partial.write_text("whole")
        partial.with_suffix(".half").write_text("left")
        assert not (tmp_path / "out.gguf").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "out.gguf", force=True) as partial:
        partial.write_text("new")
        raise RuntimeError
    assert (tmp_path / "out.gguf").read_text() == "whole"
    with atomic_file(tmp_path / "out.gguf", force=True) as partial:
        partial.write_text("new")
        again = pytest.raises(td.TruedepthError, match="another run")
        with again, atomic_file(tmp_path / "out.gguf", force=True):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "new"
