"""Nothing that comes with a model is run, and nothing is as large as a false number says."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import forks
import truedepth as td
from tiny_models import random_ids
from truedepth.inspection import inspect_model

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


class Touch:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def copy_of(model, tmp_path, name="copy"):
    shutil.copytree(model, tmp_path / name)
    return tmp_path / name


def with_pickles(make_model, tmp_path, files):
    """The model with its weights pickled in these files, by name."""
    source = copy_of(make_model(), tmp_path)
    tensors = {name: t.read().clone() for name, t in td.open_source(source).tensors.items()}
    (source / "model.safetensors").unlink()
    weight_map = {name: files[i % len(files)] for i, name in enumerate(sorted(tensors))}
    for file in files:
        held = {name: tensors[name] for name in tensors if weight_map[name] == file}
        torch.save(held, source / file)
    if len(files) > 1:
        index = json.dumps({"weight_map": weight_map})
        (source / "pytorch_model.bin.index.json").write_text(index)
    return source


@pytest.mark.parametrize(
    "files", [["pytorch_model.bin"], ["weights.pt"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]]
)
def test_pickled_weights_are_read_only_where_that_is_allowed(make_model, tmp_path, files):
    source = with_pickles(make_model, tmp_path, files)
    with pytest.raises(td.TruedepthError, match="--allow-pickle"):
        td.open_source(source).tensors  # noqa: B018
    allowed = td.open_source(source, allow_pickle=True)
    original = td.open_source(make_model())
    assert set(allowed.tensors) == set(original.tensors)
    for name, tensor in allowed.tensors.items():
        assert torch.equal(tensor.read(), original.tensors[name].read())
    plan = td.Plan(6, [[1, 2]])
    td.convert(allowed, tmp_path / "one", plan)
    td.convert(original, tmp_path / "two", plan)
    one, two = (td.open_source(tmp_path / name).tensors for name in ("one", "two"))
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(one[name].read(), two[name].read())
    ids = random_ids()
    assert torch.equal(td.load(allowed).model(ids).logits, td.load(original).model(ids).logits)


def malicious(path):
    """What torch.save writes, with a pickle that touches a file in its place."""
    whole = io.BytesIO()
    torch.save({"a": torch.ones(2)}, whole)
    out = io.BytesIO()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            bad = name.endswith("data.pkl")
            new.writestr(name, pickle.dumps({"a": Touch(path)}) if bad else old.read(name))
    return out.getvalue()


def test_a_pickle_that_does_something_is_refused_even_where_pickles_are_allowed(
    make_model, tmp_path
):
    source = with_pickles(make_model, tmp_path, ["pytorch_model.bin"])
    file = source / "pytorch_model.bin"
    for data in (malicious(tmp_path / "ran"), pickle.dumps({"a": Touch(tmp_path / "ran")})):
        file.write_bytes(data)
        with pytest.raises(
            td.TruedepthError, match=r"something other than tensors|not in the archive format"
        ):
            td.open_source(source, allow_pickle=True).tensors  # noqa: B018
    file.write_bytes(malicious(tmp_path / "ran"))
    torch.load(file, weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([torch.ones(2)], "by name"),
        ({"a": 1}, "by name"),
        ({}, "by name"),
        ({"a": torch.ones(1).expand(1 << 40)}, "not supported"),
        ({"a": torch.ones(2).to_sparse()}, "not supported"),
    ],
)
def test_pickles_of_other_things(make_model, tmp_path, held, words):
    source = with_pickles(make_model, tmp_path, ["pytorch_model.bin"])
    torch.save(held, source / "pytorch_model.bin")
    with pytest.raises(td.TruedepthError, match=words):
        td.open_source(source, allow_pickle=True).tensors  # noqa: B018


def test_compressed_pickles_are_refused(make_model, tmp_path):
    """A megabyte of them can be a gigabyte."""
    source = with_pickles(make_model, tmp_path, ["pytorch_model.bin"])
    file = source / "pytorch_model.bin"
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(td.TruedepthError, match="compressed"):
        td.open_source(source, allow_pickle=True).tensors  # noqa: B018


def plant(source, file, text, **names):
    """A Python file in a model, which leaves `ran` beside the model, and what names it."""
    leave = f"import pathlib\npathlib.Path({str(source.parent / 'ran')!r}).touch()\n"
    (source / file).write_text(leave + text)
    for name, auto_map in names.items():
        path = source / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


TOKENIZER = "from transformers import PreTrainedTokenizerFast as Own\nclass Tokenizer(Own): pass\n"


@pytest.fixture
def with_code(make_model, tmp_path):
    """A Llama whose config and tokenizer name code of their own."""
    source = copy_of(make_model(), tmp_path)
    model = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    plant(source, "modeling_own.py", "raise SystemExit('ran')\n", config=model)
    auto_map = {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}
    plant(source, "tokenization_own.py", TOKENIZER, tokenizer_config=auto_map)
    (source / "custom_generate").mkdir()
    plant(source, "custom_generate/generate.py", "raise SystemExit('ran')\n")
    return source


TEXT = ["--text", "TEXT"]
COMMANDS = [
    ["info", "MODEL"],
    ["convert", "MODEL", "out", "--layers", "2-3", "--calibrate", *TEXT, "--tokens", "1100"],
    ["plan", "MODEL", "-o", "plan.yaml", "--pairs", "1", *TEXT, "--tokens", "1100"],
    ["study", "MODEL", "-o", "study", *TEXT, "--window", "32", "--windows", "1", "--stride", "3"],
    ["eval", "MODEL", *TEXT, "--window", "32", "--windows", "2"],
    ["generate", "MODEL", "cat", "--max-new-tokens", "3"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_code_that_comes_with_a_model_is_not_run(with_code, prose, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = forks.truedepth(*({"MODEL": with_code, "TEXT": prose}.get(word, word) for word in words))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_code_runs_where_it_is_trusted_and_a_models_never(with_code, prose, tmp_path):
    source = td.open_source(with_code, trust_remote_code=True)
    assert type(source.tokenizer).__name__ == "Tokenizer"
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    words = ["--text", prose, "--window", "32", "--windows", "2", "--trust-remote-code"]
    done = forks.truedepth("eval", with_code, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()
    td.load(with_code)


def test_a_tokenizer_that_needs_its_code_says_so(with_code):
    (with_code / "tokenizer.json").unlink()
    with pytest.raises(td.TruedepthError, match="--trust-remote-code"):
        td.open_source(with_code).tokenizer  # noqa: B018


def test_our_checkpoints_do_not_run_the_modeling_file_in_them(make_model, tmp_path):
    out = tmp_path / "out"
    td.convert(make_model(), out, td.Plan(6, [[1, 2]]))
    expected = td.load(out).model(random_ids()).logits
    plant(out, "modeling.py", "raise SystemExit('ran')\n")
    loaded = td.load(td.open_source(out, trust_remote_code=True))
    loaded.tokenizer  # noqa: B018
    assert torch.equal(loaded.model(random_ids()).logits, expected)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"vocab_size": 10**4000}, "vocab_size"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"head_dim": -1}, "head_dim"),
        ({"intermediate_size": True}, "intermediate_size"),
        ({"layer_widths": [10**9]}, "layer_widths"),
        ({"layer_widths": [1000, 1000]}, "2000 layers"),
        ({"attn_implementation": "someone/kernel"}, "code from the hub"),
    ],
)
def test_absurd_configs(make_model, tmp_path, changes, words):
    source = copy_of(make_model(), tmp_path)
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(td.TruedepthError, match=words):
        inspect_model(source)


def test_configs_that_are_no_files_or_too_large(make_model, tmp_path):
    source = copy_of(make_model(), tmp_path)
    (source / "config.json").write_text("[" * (3 << 20))
    with pytest.raises(td.TruedepthError, match="too large"):
        td.open_source(source)
    (source / "config.json").write_text("[" * 100_000)
    with pytest.raises(td.TruedepthError, match="not valid JSON"):
        td.open_source(source)
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/dev/zero")
    with pytest.raises(td.TruedepthError, match="is not a file"):
        td.open_source(source)


@pytest.mark.parametrize("name", ["..", "a" * 300 + ".safetensors", "\ud800.safetensors", "x.py"])
def test_shards_of_odd_names(make_model, tmp_path, name):
    source = copy_of(make_model(), tmp_path)
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(td.TruedepthError, match="not a plain name"):
        td.open_source(source).tensors  # noqa: B018


def test_links_of_the_hubs_cache_are_followed_and_others_not_copied(make_model, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(make_model().iterdir()):
        shutil.copy(file, snapshot.parent.parent / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    td.convert(snapshot, tmp_path / "out", td.Plan(6, [[1, 2]]))
    assert td.open_source(tmp_path / "out").tokenizer("a")
    (tmp_path / "id_rsa").write_text("a key")
    (snapshot / "LICENSE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(td.TruedepthError, match="id_rsa, which is not copied"):
        td.convert(snapshot, tmp_path / "out2", td.Plan(6, [[1, 2]]))
    assert not (tmp_path / "out2").exists()


LAUGHS = "a0: &a0 [1]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{LAUGHS}\nnum_layers: 2\ngroups: *a11", "not valid YAML"),
        ("num_layers: 1000000000\ngroups: []", "more than a plan may have"),
        (f"num_layers: 2\ngroups: [[0x{'f' * 9000}]]", "bits"),
        ("num_layers: 2\ngroups: [[!!python/object/apply:os.system [id]]]", "not valid YAML"),
        ("num_layers: 2\ngroups: " + "[" * 20000, "not valid YAML"),
        ("num_layers: 2\ngroups: [[" + "[1]," * 9000 + "]]", "whole numbers, not"),
        ("# " + "x" * (1 << 17), "too large"),
    ],
)
def test_absurd_plans(tmp_path, text, words):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(td.TruedepthError, match=words) as caught:
        td.Plan.from_yaml(tmp_path / "plan.yaml")
    assert len(str(caught.value)) < 500


def test_the_readers_take_damaged_files(tmp_path):
    """A short run of the fuzzer; docs/reliability.md has a long one."""
    found = tmp_path / "fuzz.json"
    line = [sys.executable, FUZZ, "--count", "20", "--seed", "11", "--json", found]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    readers = json.loads(found.read_text())["readers"]
    assert len(readers) == 6
    for figures in readers.values():
        assert figures["opened"] + figures["refused"] == figures["inputs"] == 20
