"""GGUF files where no config.json is: in a hub repository, in a directory."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import LlamaConfig

import truedepth as td
from gguf_files import GGUF_TINY, write_gguf
from sources.test_hub_download import REPO, Hub
from tiny_models import random_model

FILE = "m [v1]-Q8_0.gguf"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "m"
    directory.mkdir()
    write_gguf(directory / FILE, random_model(LlamaConfig(**GGUF_TINY)))
    (directory / "LICENSE").write_text("free")
    return directory


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub(model) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        urls = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_repository_of_gguf_files_lists_them(hub: Hub) -> None:
    with pytest.raises(td.TruedepthError) as caught:
        td.open_source(REPO)
    assert f"GGUF files; give one of them: {REPO}:{FILE}." in str(caught.value)
    assert [name for name, _ in hub.asked if name.endswith(".gguf")] == []


def test_a_file_of_a_repository_is_a_model(hub: Hub, model: Path) -> None:
    source, local = td.open_source(f"{REPO}:{FILE}"), td.open_source(model / FILE)
    assert (source.name, source.config) == (f"{REPO}:{FILE}", local.config)
    assert [name for name, _ in hub.asked] == [FILE]
    for name, tensor in local.tensors.items():
        assert torch.equal(source.tensors[name].read(), tensor.read())


@pytest.mark.parametrize("wrong", ["m.gguf", "../../../m.gguf", "*.gguf"])
def test_a_file_that_the_repository_lacks(hub: Hub, wrong: str) -> None:
    with pytest.raises(td.TruedepthError) as caught:
        td.open_source(f"{REPO}:{wrong}")
    assert f"has no file {wrong!r}; it has {REPO}:{FILE}." in str(caught.value)


def test_a_directory_of_gguf_files_lists_them(model: Path) -> None:
    with pytest.raises(td.TruedepthError, match=r"no config\.json, but GGUF files") as caught:
        td.open_source(model)
    assert str(model / FILE) in str(caught.value)


def test_an_adapter_is_named(tmp_path: Path, make_model) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "someone/base", "peft_type": "LORA"}'
    )
    words = "is an adapter of 'someone/base', not a model; merge it"
    with pytest.raises(td.TruedepthError, match=words):
        td.open_source(tmp_path / "a")
    shutil.copy(make_model() / "config.json", tmp_path / "a")  # some trainers leave one
    with pytest.raises(td.TruedepthError, match=words):
        td.open_source(tmp_path / "a").tensors  # noqa: B018


def test_weights_in_another_format_are_named(tmp_path: Path, make_model) -> None:
    source = tmp_path / "m"
    shutil.copytree(make_model(), source)
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    with pytest.raises(td.TruedepthError, match=r"these are not read: consolidated\.safetensors"):
        td.open_source(source).tensors  # noqa: B018
    (source / "config.json").rename(source / "params.json")
    with pytest.raises(td.TruedepthError, match=r"params\.json, another format"):
        td.open_source(source)
