"""What goes along with a model: found, fetched and copied by one list, and looked at early."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

import truedepth as td
from truedepth import modeling
from truedepth.sources.companions import COMPANIONS, companions, in_folders, matching

PLAN = td.Plan(6, [[1, 2]])

GO_ALONG = [
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7m1"),
    *("tekken.json", "qwen.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer_config.json", "tokenization_own.py", "tokenizer.4.0.0.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    "generation_config.json",
    *("LICENSE", "LICENCE", "license.txt", "License.md", "LICENSE-MODEL", "MODEL_LICENSE"),
    *("COPYING", "NOTICE", "Notice.txt", "USE_POLICY.md", "use_policy", "third_party_notices.txt"),
]
STAY = [
    *("README.md", "optimizer.pt", "consolidated.safetensors", "training_args.bin", "model.onnx"),
    *("original/tokenizer.model", "onnx/tokenizer.json", "gguf/LICENSE", "tokenizers/a.json"),
    *("additional_chat_templates/more/x.jinja", "additional_chat_templates/x.bin", "vocab.d/a"),
    *("tokenizer.json.dvc", "config.json", "adapter_model.safetensors", "chat_template.txt"),
]


def copy_of(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "source"))


def test_the_hub_and_a_directory_go_by_one_list(tmp_path):
    for name in GO_ALONG + STAY:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "licenses").mkdir()  # a folder is no licence
    assert companions(tmp_path) == sorted(GO_ALONG)
    assert matching(GO_ALONG + STAY, COMPANIONS) == sorted(GO_ALONG)
    fetched = filter_repo_objects(
        [name for name in GO_ALONG + STAY if not name.endswith(".dvc")],
        allow_patterns=list(COMPANIONS),
        ignore_patterns=in_folders(COMPANIONS),
    )
    assert sorted(fetched) == sorted(GO_ALONG)


def test_all_of_them_are_copied(make_model, tmp_path):
    source = copy_of(make_model(), tmp_path)
    for name in GO_ALONG + STAY:
        if not (source / name).exists() and name not in ("spiece.model", "tokenizer.4.0.0.json"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(json.dumps({"this": name}))
    td.convert(source, tmp_path / "out", PLAN)
    for name in companions(source):
        if name != "tokenizer_config.json":
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    made = {"config.json", "model.safetensors", "README.md", *(f.name for f in modeling.FILES)}
    found = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    assert found - made <= set(GO_ALONG)


def dangling(target):
    def make(file):
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return make


def text(held):
    def make(file):
        file.unlink(missing_ok=True)
        file.write_text(held)

    return make


def directory(file):
    file.unlink(missing_ok=True)
    file.mkdir()


def pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def huge(file):
    with file.open("wb") as opened:
        opened.truncate(65 << 20)


def only_dvc(file):
    file.unlink(missing_ok=True)
    file.with_name(f"{file.name}.dvc").write_text("outs: []")


def private(file):
    (file.parent.parent / "id_rsa").write_text("a key")
    dangling("../id_rsa")(file)


def named_like_a_store(file):
    """The name of a hash, but not of this content."""
    key = file.parent.parent / hashlib.sha256(b"something else").hexdigest()
    key.write_text("a key")
    dangling(f"../{key.name}")(file)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 12\n"
ANNEX = "../.git/annex/objects/1a/2b/SHA256E-s9--1f.json/SHA256E-s9--1f.json"
UNFIT = [
    ("LICENSE", dangling(ANNEX), ["link to", "does not exist", "git annex get"]),
    ("tokenizer.json", dangling("/repo/.dvc/cache/files/md5/1f/2e"), ["(dvc pull)"]),
    ("merges.txt", dangling("/gone"), ["/gone, which does not exist", "dvc pull, git annex get"]),
    ("tokenizer.json", text(LFS), ["pointer of Git LFS", "git lfs pull"]),
    ("tokenizer.json", text("/annex/objects/SHA256E-s9--1f.json\n"), ["git annex get"]),
    ("tokenizer.json", only_dvc, ["tokenizer.json.dvc is there", "dvc pull"]),
    ("tokenizer.json", directory, ["must be a file", "a directory"]),
    ("special_tokens_map.json", pipe, ["must be a file", "something else"]),
    ("vocab.json", huge, ["too large for a tokenizer file", "68157440"]),
    ("NOTICE", huge, ["too large for a file that goes along", "68157440"]),
    ("tokenizer_config.json", text("{"), ["not valid JSON"]),
    ("LICENSE", private, ["id_rsa, which is not copied", "cp -L"]),
    ("LICENSE", named_like_a_store, ["which is not copied", "cp -L"]),
]


@pytest.mark.parametrize(("name", "make", "words"), UNFIT)
def test_what_cannot_go_along_is_refused_before_weights_are_read(
    make_model, tmp_path, name, make, words
):
    source = copy_of(make_model(), tmp_path)
    make(source / name)
    (source / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(td.TruedepthError) as caught:
        td.convert(source, tmp_path / "out", PLAN, calibration=td.Calibration())
    for word in [name, *words]:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_files_that_may_not_be_read(make_model, tmp_path, monkeypatch):
    """As root every file may be."""
    source, opened = copy_of(make_model(), tmp_path), Path.open
    (source / "LICENSE").write_text("free")

    def denied(self, *mode, **options):
        if self.name == "LICENSE":
            raise PermissionError(13, "Permission denied")
        return opened(self, *mode, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(td.TruedepthError, match="LICENSE: Permission denied"):
        td.convert(source, tmp_path / "out", PLAN)


def test_healing_looks_at_them_before_it_begins(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "pair", PLAN)
    (tmp_path / "pair" / "LICENSE").symlink_to("/gone")
    options = td.Healing(sequence_length=32, device="cpu")
    with pytest.raises(td.TruedepthError, match=r"LICENSE is a link to /gone"):
        td.heal(tmp_path / "pair", tmp_path / "out", teacher=make_model(), healing=options)
    assert [file.name for file in tmp_path.iterdir()] == ["pair"]


def md5_store(content):
    digest = hashlib.md5(content).hexdigest()
    return f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}"


def annex_store(content):
    key = f"SHA256E-s{len(content)}--{hashlib.sha256(content).hexdigest()}.json"
    return f".git/annex/objects/1a/2b/{key}/{key}"


@pytest.mark.parametrize("place", [md5_store, annex_store])
def test_links_into_stores_of_files_by_their_content_are_followed(make_model, tmp_path, place):
    source = copy_of(make_model(), tmp_path)
    for file in list(source.iterdir()):
        stored = tmp_path / place(file.read_bytes())
        stored.parent.mkdir(parents=True, exist_ok=True)
        file.rename(stored)
        file.symlink_to(stored)
    td.convert(source, tmp_path / "out", PLAN)
    td.convert(make_model(), tmp_path / "expected", PLAN)
    for file in (tmp_path / "expected").iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
            assert not (tmp_path / "out" / file.name).is_symlink()


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("model.safetensors", text(LFS), "git lfs pull"),
        ("model.safetensors", dangling(ANNEX), "git annex get"),
        ("model.safetensors", only_dvc, "dvc pull"),
        ("config.json", text(LFS), "git lfs pull"),
        ("config.json", dangling("/gone"), "/gone, which does not exist"),
    ],
)
def test_weights_and_config_that_are_not_fetched(make_model, tmp_path, name, make, words):
    source = copy_of(make_model(), tmp_path)
    make(source / name)
    with pytest.raises(td.TruedepthError, match=words):
        td.open_source(source).tensors  # noqa: B018
