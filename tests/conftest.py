"""Fixtures: small random models on disk, and a text."""

from __future__ import annotations

import copy
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Of every process of the tests, before PyTorch and transformers ask for them: small models are not
# faster with more threads, and two workers of pytest must not write the same copies of modeling.py.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="modules-")}

import torch
from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar

import truedepth as td
from tiny_models import TINY, ModelMaker, byte_tokenizer, random_model

disable_progress_bar()  # tests read what the commands print


def pytest_unconfigure() -> None:
    """Remove the copies of modeling.py."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's tests, the longest, come first: no worker of two should end with them alone."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`make_model(num_hidden_layers=4, …)` gives the directory of a random model; cached."""
    made: dict[str, Path] = {}

    def make(
        dtype: torch.dtype = torch.float32,
        shard_size: str = "1GB",
        family: type = LlamaConfig,
        **options: Any,
    ) -> Path:
        key = repr((dtype, shard_size, family, sorted(options.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("model")
            config = family(
                **copy.deepcopy(TINY | options)
            )  # configs write into what they are given
            model = random_model(config).to(dtype)
            model.save_pretrained(directory, max_shard_size=shard_size)
            byte_tokenizer().save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`run("info", model)` gives (exit code, standard output, standard error)."""
    from truedepth.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["truedepth", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6,000 random words."""
    generator = random.Random(0)
    words = ["the", "cat", "sat", "on", "mat", "and", "then", "hat", "a", "dog", "saw"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(generator.choice(words) for _ in range(6000)))
    return path


@pytest.fixture(scope="session")
def pair(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A converted model and its original, loaded; for tests that change neither."""
    out = tmp_path_factory.mktemp("pair") / "out"
    td.convert(make_model(), out, td.Plan(6, [[2, 3]]))
    return td.load(out), td.load(make_model())
