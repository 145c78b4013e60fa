"""A checkpoint's tokenizer loads in any release of transformers, without the model's config."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import truedepth as td
from gguf_files import GGUF_TINY, write_gguf
from tiny_models import byte_tokenizer, random_model
from truedepth import modeling

PLAN = td.Plan(6, [[1, 2]])


def settings_of(directory):
    return json.loads((directory / "tokenizer_config.json").read_text())


def converted(make_model, tmp_path, change):
    """The settings of a source's tokenizer and of what is made of it."""
    source = Path(shutil.copytree(make_model(), tmp_path / "source"))
    settings = change(settings_of(source))
    (source / "tokenizer_config.json").unlink()
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    td.convert(source, tmp_path / "out", PLAN)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    return settings, settings_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("TokenizersBackend", "PreTrainedTokenizerFast"),  # releases before 5 do not know it
        ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("LlamaTokenizerFast", "LlamaTokenizerFast"),
        ("GPT2Tokenizer", "GPT2Tokenizer"),
        (None, "PreTrainedTokenizerFast"),
    ],
)
def test_the_class_is_one_that_every_release_knows(make_model, tmp_path, named, written):
    def name(settings):
        del settings["tokenizer_class"]
        return settings | ({"tokenizer_class": named} if named else {})

    before, after = converted(make_model, tmp_path, name)
    assert after["tokenizer_class"] == written
    assert {**after, "tokenizer_class": 0} == {**before, "tokenizer_class": 0}


def test_settings_are_written_where_there_are_none(make_model, tmp_path):
    _, after = converted(make_model, tmp_path, lambda settings: None)
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_more_special_tokens_have_the_name_that_every_release_knows(make_model, tmp_path):
    def more(settings):
        return settings | {"extra_special_tokens": ["Ġ", "the"]}

    _, after = converted(make_model, tmp_path, more)
    assert after["additional_special_tokens"] == ["Ġ", "the"]
    assert "extra_special_tokens" not in after
    tokenizer = td.open_source(tmp_path / "out").tokenizer
    assert {"Ġ", "the"} <= set(tokenizer.all_special_tokens)


def test_a_tokenizer_with_its_own_code_stays_as_it_is(make_model, tmp_path, capsys):
    def own(settings):
        return settings | {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}}

    before, after = converted(make_model, tmp_path, own)
    assert after == before
    assert "note: The tokenizer of source has its own code" in capsys.readouterr().err


def test_nothing_is_written_twice_where_all_is_well(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    td.convert(make_model(), tmp_path / "again", PLAN)
    first = (tmp_path / "out" / "tokenizer_config.json").read_bytes()
    assert first == (tmp_path / "again" / "tokenizer_config.json").read_bytes()


def test_a_gguf_files_tokenizer(tmp_path):
    model = random_model(LlamaConfig(**GGUF_TINY))
    write_gguf(tmp_path / "a.gguf", model)
    plan = td.Plan(model.config.num_hidden_layers, [[0, 1]])
    td.convert(tmp_path / "a.gguf", tmp_path / "out", plan)
    settings = settings_of(tmp_path / "out")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)


ANYWHERE = """
import builtins, sys
sys.modules["truedepth"] = None  # importing it now fails
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]{})
print("ids", tokenizer("the cat sat").input_ids, tokenizer.eos_token_id)
"""


@pytest.mark.parametrize("given", ["", ", trust_remote_code=False"])
def test_it_loads_where_truedepth_is_missing_and_no_code_is_run(make_model, tmp_path, given):
    """Programs give False; where nothing is given, transformers 5 asks, and loads it anyway."""
    td.convert(make_model(), tmp_path / "out", PLAN)
    for file in modeling.FILES:
        (tmp_path / "out" / file.name).write_text("raise SystemExit('ran')\n")
    done = subprocess.run(
        [sys.executable, "-c", ANYWHERE.format(given), tmp_path / "out"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    expected = byte_tokenizer()("the cat sat")["input_ids"]
    assert done.stdout.splitlines()[-1].endswith(f"ids {expected} 0")
