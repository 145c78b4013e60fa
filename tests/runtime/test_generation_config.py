"""What an answer, checked drafts and a model's own text follow of a generation_config.json."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

import truedepth as td
from truedepth import progress
from truedepth.runtime.generation import answer, own_text

PROMPT, LENGTH = "the cat sat on the", 24


@pytest.fixture
def made(make_model, tmp_path, monkeypatch):
    """`made(num_beams=4)` loads the random model with such a generation config."""
    monkeypatch.setattr(progress, "_noted", set())
    original = tmp_path / "model"
    shutil.copytree(make_model(), original)
    config = original / "generation_config.json"
    written = json.loads(config.read_text())

    def make(**settings):
        config.write_text(json.dumps(written | settings))
        return td.load(original)

    return make


@pytest.fixture
def draft(make_model, tmp_path):
    """One whose tokens often stand, so that several come at a time."""
    td.convert(make_model(), tmp_path / "draft", td.Plan(6))
    return td.load(tmp_path / "draft")


@torch.no_grad()
def greedy(loaded, changed=lambda logits, ids: logits, length=LENGTH):
    """The likeliest tokens after the prompt, from full passes whose logits may be changed."""
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    start = len(ids)
    while len(ids) < start + length and ids[start:][-1:] != [loaded.tokenizer.eos_token_id]:
        logits = loaded.model(torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(changed(logits.clone(), ids).argmax())]
    return tuple(ids[start:])


IGNORED = {
    "beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "several sequences": {"num_return_sequences": 3},
    "several beams": {"num_return_sequences": 3, "num_beams": 3},
    "groups of beams": {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
    "a cache of one size": {"cache_implementation": "static"},
    "a quantized cache": {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
    "a cache that nobody knows": {"cache_implementation": "bogus"},
    "another way to run": {"cache_implementation": "paged"},
    "no cache": {"use_cache": False},
    "a record": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "forced tokens": {"forced_eos_token_id": 5, "forced_bos_token_id": 4},
    "guidance": {"guidance_scale": 1.5},
    "a watermark": {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"}},
    "a watermark of no kind": {"watermarking_config": {"bogus": 1}},
    "a time": {"max_time": 1e-6},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "layers that are contrasted": {"dola_layers": "high"},
    "words that must come": {"force_words_ids": [[[5]]]},
    "drafts from the prompt": {"prompt_lookup_num_tokens": 3},
    "values made numbers": {"remove_invalid_values": True},
    "healed tokens": {"token_healing": True},
}

SILENT = {
    "lengths of other calls": {"max_length": 3, "max_new_tokens": 1},
    "lengths that no call has": {"max_new_tokens": 0},
    "settings of sampling": {"do_sample": True, "temperature": 0.1, "top_k": 3, "top_p": 0.1},
    "settings of drafts": {"num_assistant_tokens": 9, "assistant_confidence_threshold": 0.9},
    "more than fits": {"min_new_tokens": 999, "min_length": 999},
    "values that are none": {"early_stopping": "bogus", "pad_token_id": -1},
    "names of methods": {"validate": 1, "to_dict": 2, "update": 3, "streamer": 4},
    "names of its own": {"chat_format": "chatml", "custom_generate": "owner/name"},
    "no end tokens": {"eos_token_id": None},
    "end tokens of other models": {"eos_token_id": [0, 99999]},
    "what is always so": {"num_beams": 1, "num_return_sequences": 1, "use_cache": True},
}


@pytest.mark.parametrize("settings", [*IGNORED.values(), *SILENT.values()], ids=[*IGNORED, *SILENT])
def test_what_changes_no_answer_and_no_text(made, draft, capsys, settings):
    expected = greedy(plain := made())
    own = own_text(plain, 3, 12, seed=1)
    loaded = made(**settings)
    assert answer(loaded, PROMPT, max_new_tokens=LENGTH).ids == expected
    notes = capsys.readouterr().err.splitlines()
    if settings in IGNORED.values():
        (said,) = notes
        assert said.startswith("truedepth: note: the answer does not follow ")
        assert next(iter(settings)) in said and said.endswith("generation config of model.")
    else:
        assert notes == []
    checked = answer(loaded, PROMPT, draft=draft, max_new_tokens=LENGTH)
    assert checked.ids == expected and checked.passes < LENGTH
    assert torch.equal(own_text(loaded, 3, 12, seed=1), own)


def penalized(penalty):
    def changed(logits, ids):
        for token in set(ids):
            logits[token] = (
                logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
            )
        return logits

    return changed


def without(*tokens):
    def changed(logits, ids):
        logits[list(tokens)] = -torch.inf
        return logits

    return changed


def unrepeated(logits, ids):
    """No pair of tokens twice."""
    for first, second in itertools.pairwise(ids):
        if first == ids[-1]:
            logits[second] = -torch.inf
    return logits


def biased(logits, ids):
    logits[5] += 40
    return logits


FOLLOWED = {
    "a penalty": ({"repetition_penalty": 1.4}, penalized(1.4)),
    "a penalty without a point": ({"repetition_penalty": 2}, penalized(2)),
    "pairs that come once": ({"no_repeat_ngram_size": 2}, unrepeated),
    "a bias": ({"sequence_bias": [[[5], 40.0]]}, biased),
}


@pytest.mark.parametrize(("settings", "changed"), FOLLOWED.values(), ids=FOLLOWED)
def test_what_an_answer_follows(made, draft, settings, changed):
    plain = made()
    expected, own = greedy(plain, changed), own_text(plain, 3, 12, seed=1)
    assert expected != greedy(plain)
    loaded = made(**settings)
    assert answer(loaded, PROMPT, max_new_tokens=LENGTH).ids == expected
    assert answer(loaded, PROMPT, draft=draft, max_new_tokens=LENGTH).ids == expected
    assert torch.equal(own_text(loaded, 3, 12, seed=1), own)


@pytest.mark.parametrize("name", ["suppress_tokens", "bad_words_ids"])
def test_tokens_that_never_come(made, draft, name):
    unwanted = sorted(set(greedy(made())))[:2]
    expected = greedy(made(), without(*unwanted))
    given = unwanted if name == "suppress_tokens" else [[token] for token in unwanted]
    loaded = made(**{name: given})
    assert answer(loaded, PROMPT, max_new_tokens=LENGTH).ids == expected
    assert answer(loaded, PROMPT, draft=draft, max_new_tokens=LENGTH).ids == expected


@pytest.mark.parametrize("form", [int, lambda token: [0, token], float])
def test_end_tokens(made, draft, form):
    whole = greedy(made())
    end = next(token for token in whole if whole.index(token) > 3)
    expected = whole[: whole.index(end) + 1]
    loaded = made(eos_token_id=form(end))
    assert answer(loaded, PROMPT, max_new_tokens=LENGTH).ids == expected
    assert answer(loaded, PROMPT, draft=draft, max_new_tokens=LENGTH).ids == expected


def test_the_end_token_of_the_tokenizer_ends_where_the_file_names_none(made):
    whole = greedy(made())
    end = next(token for token in whole if whole.index(token) > 3)
    loaded = made(eos_token_id=None)
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(end)
    found = answer(loaded, PROMPT, max_new_tokens=LENGTH).ids
    assert found == whole[: whole.index(end) + 1]


def test_an_answer_is_as_long_as_the_file_says_at_least(made):
    whole = greedy(made())
    end = whole[3]
    loaded = made(eos_token_id=end, min_new_tokens=12)

    def late(logits, ids):
        return without(end)(logits, ids) if len(ids) < start + 12 else logits

    start = len(loaded.tokenizer(PROMPT)["input_ids"])
    expected = greedy(loaded, late)
    found = answer(loaded, PROMPT, max_new_tokens=LENGTH).ids
    assert len(found) >= 12 and found == expected[: len(found)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings(made, draft, capsys, stream, as_list):
    """Text ends with the first token that completes one, with drafts too."""
    plain = made()
    whole = greedy(plain, penalized(1.3))
    pieces = [plain.tokenizer.decode([token]).strip() for token in whole]
    string = next(p for p in pieces[6:] if p.isprintable() and p.isascii() and p)
    assert string not in "".join(pieces[:6])
    expected = whole[: pieces.index(string) + 1]
    assert len(expected) % 6  # six tokens come at a time from a draft of five
    stops = [string, ""] if as_list else string
    loaded = made(repetition_penalty=1.3, stop_strings=stops)
    for options in ({}, {"draft": draft, "draft_tokens": 5}):
        found = answer(loaded, PROMPT, max_new_tokens=LENGTH, stream=stream, **options)
        assert found.ids == expected
        assert found.text.endswith(string)
        printed = capsys.readouterr().out.strip()
        assert printed == (found.text if stream else "")


def test_sampling_settings_are_followed_where_tokens_are_sampled(made):
    """With top_k of 1, or as much as no top_p, every sample is the likeliest token."""
    expected = greedy(made())
    for settings in ({"top_k": 1}, {"top_k": 1.0}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert answer(made(**settings), PROMPT, max_new_tokens=LENGTH, temperature=3.0).ids == (
            expected
        )
    for settings in ({"top_k": -1}, {"top_k": 0, "top_p": 1}):  # no limit
        torch.manual_seed(0)
        found = answer(made(**settings), PROMPT, max_new_tokens=LENGTH, temperature=3.0).ids
        assert found != expected


WRONG = {
    "a penalty that is text": ({"repetition_penalty": "high"}, "with repetition_penalty 'high'"),
    "a penalty below zero": ({"repetition_penalty": -1.0}, "with repetition_penalty -1.0"),
    "words beyond the vocabulary": (
        {"bad_words_ids": [[99999]]},
        r"with bad_words_ids \[\[99999\]\] in its generation config: ValueError",
    ),
    "words that are none": ({"bad_words_ids": "x"}, "bad_words_ids 'x'"),
    "an end that is text": ({"eos_token_id": "</s>"}, "'</s>' as eos_token_id"),
    "stops that are numbers": ({"stop_strings": [1]}, r"\[1\] as stop_strings"),
    "suppressed letters": ({"suppress_tokens": "abc"}, "suppress_tokens 'abc'"),
}


@pytest.mark.parametrize(("settings", "words"), WRONG.values(), ids=WRONG)
def test_values_that_cannot_be_followed(made, settings, words):
    """An answer is refused in a sentence; a model's own text does not read them."""
    own = own_text(made(), 3, 12, seed=1)
    loaded = made(**settings)
    with pytest.raises(td.TruedepthError, match=words):
        answer(loaded, PROMPT, max_new_tokens=4)
    assert torch.equal(own_text(loaded, 3, 12, seed=1), own)


def test_a_model_keeps_its_own_config(made, draft):
    loaded = made(num_beams=4)
    configs = loaded.model.generation_config, draft.model.generation_config
    answer(loaded, PROMPT, draft=draft, max_new_tokens=4)
    own_text(loaded, 2, 8)
    assert configs == (loaded.model.generation_config, draft.model.generation_config)
    assert loaded.model.generation_config.num_beams == 4


def test_too_little_memory(made, monkeypatch):
    loaded = made()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(loaded.model, "generate", full)
    for call in (lambda: answer(loaded, PROMPT), lambda: own_text(loaded, 2, 8)):
        with pytest.raises(td.TruedepthError, match=r"not enough memory .*2 GiB") as caught:
            call()
        assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "use_cache": False, "max_length": 4},
        {"num_return_sequences": 2},
        {"cache_implementation": "bogus"},
        {"max_new_tokens": 0, "early_stopping": "bogus"},
        {"watermarking_config": {"bogus": 1}},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_settings_in_the_models_own_config(made, make_model, tmp_path, settings):
    """Old checkpoints name settings of generation in config.json."""
    expected = greedy(made())
    source = tmp_path / "old"
    shutil.copytree(make_model(), source)
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | settings))
    td.convert(source, tmp_path / "out", td.Plan(6))
    draft = td.load(tmp_path / "out")
    assert answer(td.load(source), PROMPT, max_new_tokens=LENGTH).ids == expected
    assert answer(td.load(source), PROMPT, draft=draft, max_new_tokens=LENGTH).ids == expected


def test_a_penalty_in_the_models_own_config(made, make_model, tmp_path):
    expected = greedy(made(), penalized(1.4))
    source = tmp_path / "old"
    shutil.copytree(make_model(), source)
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text()) | {"repetition_penalty": 1.4}
    (source / "config.json").write_text(json.dumps(config))
    assert answer(td.load(source), PROMPT, max_new_tokens=LENGTH).ids == expected
