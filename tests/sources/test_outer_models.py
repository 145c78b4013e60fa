"""Models that take pictures or sound too: the decoder inside is converted in its place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import truedepth as td
from family_models import repaired, staged
from outer_models import MORE, OTHERS, PICTURES, auto_of, config_of, model_of, picture_inputs
from over_ranks import found_over_two_ranks
from tiny_models import byte_tokenizer, random_ids
from truedepth.inspection import inspect_model

PLAN = td.Plan(6, stages=[["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]])
STAGES = [list(map(str, stage)) for stage in PLAN.stages]
CLOSE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)` gives a model and its directory; cached."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = model_of(name)
            model.save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
            (directory / "preprocessor_config.json").write_text('{"size": 16}')
            made[name] = model, directory
        return made[name]

    return make


def weights(directory):
    return load_file(directory / "model.safetensors")


EACH = [*PICTURES, *OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.parametrize("name", EACH)
def test_the_decoder_inside_runs_in_stages(saved, name, tmp_path):
    original, source = saved(name)
    ids, out = random_ids(), tmp_path / "out"
    td.convert(source, out, PLAN)
    before, after = weights(source), weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert (out / "preprocessor_config.json").read_text() == '{"size": 16}'
    inputs = {"input_ids": ids}
    if name in PICTURES:
        inputs = picture_inputs(name, ids[:1])
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    expected = staged(original, inputs["input_ids"], STAGES, **others)
    whole = auto_of(name).from_pretrained(out)
    with torch.inference_mode():
        assert (original(**inputs).logits - expected).abs().max() > 1e-2
        torch.testing.assert_close(whole(**inputs).logits, expected, **CLOSE)
        tokens = whole.generate(**inputs, **GREEDY)
        assert torch.equal(tokens, whole.generate(**inputs, use_cache=False, **GREEDY))
        text = td.load(out).model(ids).logits
        torch.testing.assert_close(text, staged(original, ids, STAGES), **CLOSE)
    whole.save_pretrained(tmp_path / "again")
    again = auto_of(name).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**inputs).logits, whole(**inputs).logits, **CLOSE)
    assert weights(tmp_path / "again").keys() == before.keys()


WITHOUT_TRUEDEPTH = """
import json, sys
sys.modules["truedepth"] = None  # importing it now fails
import torch, transformers
found = {}
with torch.no_grad():
    for name, (auto, path) in json.loads(sys.argv[2]).items():
        model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True)
        found[name] = model(input_ids=torch.load(sys.argv[1])).logits
torch.save(found, sys.argv[3])
"""


def test_a_fresh_process_without_truedepth(saved, tmp_path):
    names = ("llava", "gemma3", "qwen2_audio")
    torch.save(random_ids(), tmp_path / "ids")
    for name in names:
        td.convert(saved(name)[1], tmp_path / name, PLAN)
    where = {name: (auto_of(name).__name__, str(tmp_path / name)) for name in names}
    given = [str(tmp_path / "ids"), json.dumps(where), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", WITHOUT_TRUEDEPTH, *given], check=True)
    for name, logits in torch.load(tmp_path / "found").items():
        expected = staged(saved(name)[0], random_ids(), STAGES)
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_stage_costs_one_all_reduce(saved, tmp_path):
    names = ["llava", "exaone4_5"]
    for name in names:
        td.convert(saved(name)[1], tmp_path / name, PLAN)
    for found in found_over_two_ranks(tmp_path, names, random_ids()):
        for name, own in found.items():
            expected = staged(saved(name)[0], random_ids(), STAGES)
            torch.testing.assert_close(own["logits"], expected, **CLOSE)
            assert own["all_reduces"] == len(PLAN.stages), name


def test_stages_inside_are_fused(saved, tmp_path):
    _, source = saved("llava")
    td.convert(source, tmp_path / "out", PLAN)
    inputs = picture_inputs("llava", random_ids(1))
    whole = auto_of("llava").from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        expected = whole(**inputs).logits
        torch.testing.assert_close(td.fuse(whole)(**inputs).logits, expected, **CLOSE)


def test_the_decoder_inside_is_calibrated_and_healed(saved, prose, tmp_path):
    _, source = saved("llava")
    raw, calibrated, healed = repaired(source, td.Plan.staggered(6, 1, 4), prose, tmp_path)
    assert healed < calibrated < raw
    before, after = weights(tmp_path / "raw"), weights(tmp_path / "healed")
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed
    assert all("language_model" in key and ".layers." in key for key in changed)
    auto_of("llava").from_pretrained(tmp_path / "healed")


def test_heads_of_the_decoder_inside_are_padded(tmp_path):
    config = config_of("llava")
    config.text_config.hidden_size = 48
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 3
    torch.manual_seed(0)
    auto_of("llava").from_config(config).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    td.convert(tmp_path / "source", tmp_path / "out", td.Plan(6), pad_heads=2)
    before, after = (auto_of("llava").from_pretrained(tmp_path / n) for n in ("source", "out"))
    assert after.config.text_config.num_attention_heads == 4
    ids = random_ids()
    torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits, **CLOSE)


def test_dtype_is_that_of_the_whole(saved, tmp_path):
    _, source = saved("llava")
    td.convert(source, tmp_path / "out", PLAN, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    whole = auto_of("llava").from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.bfloat16}


def test_names_of_the_current_class_are_read_too(saved, tmp_path):
    original, source = saved("llava")
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = {key: value.contiguous() for key, value in original.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert state.keys() != weights(source).keys()
    ids = random_ids()
    with torch.inference_mode():
        expected = original(input_ids=ids).logits
        torch.testing.assert_close(td.load(tmp_path).model(ids).logits, expected, **CLOSE)


def test_info_says_what_it_is_inside_of(saved, tmp_path):
    _, source = saved("llava")
    assert inspect_model(source).inside == "llava"
    td.convert(source, tmp_path / "out", PLAN)
    found = inspect_model(tmp_path / "out")
    assert (found.inside, found.family, found.plan) == ("llava", "llama", PLAN)
    assert "input than text" in found.engines["vLLM"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_layers_inside_are_not_made_wide(saved, tmp_path):
    """Groups run side by side, so the whole keeps its number of layers."""
    original, source = saved("llava")
    td.convert(source, tmp_path / "out", td.Plan(6, [[2, 3]]))
    whole = auto_of("llava").from_pretrained(tmp_path / "out")
    assert whole.config.text_config.num_hidden_layers == 6
    ids = random_ids()
    grouped = [["A0"], ["F0"], ["A1"], ["F1"], ["A2", "A3"], ["F2", "F3"]]
    grouped += [["A4"], ["F4"], ["A5"], ["F5"]]
    with torch.inference_mode():
        expected = staged(original, ids, grouped)
        torch.testing.assert_close(whole(input_ids=ids).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("qwen3_5", "its language model (qwen3_5_text) is not supported: its layers differ"),
        ("qwen2_5_vl", "its language model (qwen2_5_vl_text) is not supported"),
        ("pp_chart2table", "no class of its own for it"),
        ("no_such_model", "save its language model (llama) as a checkpoint of its own"),
    ],
)
def test_others_are_refused_with_the_reason(model_type, words, tmp_path):
    config = {"model_type": model_type, "text_config": {"model_type": "llama"}}
    if model_type != "no_such_model":
        config = AutoConfig.for_model(model_type).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(td.TruedepthError) as error:
        inspect_model(tmp_path)
    assert words in str(error.value)
