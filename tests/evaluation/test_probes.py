"""Probes: their answers are right, their texts fit, and models are scored on the same items."""

from __future__ import annotations

import re

import pytest
import torch

import truedepth as td
from truedepth.evaluation import probes
from truedepth.evaluation.probes import LONG, SHORT, Item, long_items, probe, short_items


def last_question(item):
    return item.prompt.rpartition("\n\n")[2]


def solved(name, item):
    """The answer by another way than the one that made it."""
    asked = last_question(item)
    if name in ("sums", "products"):
        return str(eval(asked.removesuffix("=")))
    if name == "brackets":
        closed, stack = dict(["()", "[]", "{}"]), asked.split()
        return " ".join(closed[each] for each in stack[::-1])
    words = asked.partition(": ")[2].partition("\n")[0]
    if name == "copying":
        return words
    if name == "reversing":
        return " ".join(words.split()[::-1])
    wanted = re.search(r"of (\w+):$", asked)[1]
    return re.search(rf"{wanted} (\d+)", words)[1]


@pytest.mark.parametrize("name", SHORT)
def test_answers_are_right(name):
    items = short_items(name, 40, seed=3)
    assert all(solved(name, item) == item.answer for item in items)
    assert all(item.prompt.count("\n\n") == probes.EXAMPLES for item in items)
    assert len({item.prompt for item in items}) == 40


def test_a_needle_is_in_its_text(make_model):
    source = td.open_source(make_model())
    for item in long_items("needle", 5, 0, 500, source):
        text, _, question = item.prompt.rpartition("\n")
        assert f"{question} {item.answer}." in text
        assert len(re.findall(r"The number of the \w+ house is \d+\.", text)) == 3


def test_two_hops_lead_to_the_answer(make_model):
    source = td.open_source(make_model())
    for item in long_items("two hops", 5, 0, 700, source):
        text, _, question = item.prompt.rpartition("\n")
        key = re.search(r"the (\w+) key", question)[1]
        box = re.search(rf"The {key} key opens the (\w+) box\.", text)[1]
        assert re.search(rf"The {box} box holds the number (\d+)\.", text)[1] == item.answer


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("length", [500, 1000])
def test_long_texts_are_nearly_as_long_as_is_said(make_model, name, length):
    source = td.open_source(make_model())
    for item in long_items(name, 5, 0, length, source):
        tokens = len(source.tokenizer(item.prompt)["input_ids"])
        assert length - 60 < tokens <= length


def test_a_seed_makes_the_same_items():
    assert short_items("sums", 5, 0) == short_items("sums", 9, 0)[:5]
    assert short_items("sums", 5, 0) != short_items("sums", 5, 1)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 12", True),
        ("12.\nand", True),
        ("12 .", True),
        (" 12. And", True),
        ("120", False),
        ("", False),
        ("x 12", False),
    ],
)
def test_the_first_sentence_counts(written, right):
    assert Item("5 + 7 =", "12").is_right(written) == right


def test_models_are_scored_on_the_same_items(make_model, tmp_path, monkeypatch):
    """A model that always says what the items are made to ask for; its original never does."""
    monkeypatch.setattr(probes, "SHORT", {"word": lambda rng: (rng.choice("abc"), "cat")})
    source = make_model()
    word = td.open_source(source).tokenizer(" cat")["input_ids"]
    assert len(word) == 1
    model = td.load(source)
    line = model.tokenizer("\n")["input_ids"]
    with torch.no_grad():  # " cat", then the end of the line, whatever comes before
        for layer in model.model.model.layers:
            for name, parameter in layer.named_parameters():
                if name.endswith("_proj.weight"):
                    parameter.zero_()
        embedding, head = model.model.model.embed_tokens.weight, model.model.lm_head.weight
        embedding.zero_()
        embedding[:, 0] = 1
        embedding[word[0]] = 0
        embedding[word[0], 1] = 1
        model.model.model.norm.weight.fill_(1)
        head.zero_()
        head[word[0], 0] = 1
        head[line[0], 1] = 1
    found = probe(model, against=source, items=6, lengths=())
    (score,) = found.scores
    assert (score.task, score.items, score.value, score.against) == ("word", 6, 1, 0)
    assert (score.difference, score.difference_stderr, score.kept) == (1, 0, None)
    assert found.to_dict()["scores"][0]["value"] == 1


def test_lengths_beyond_the_positions_are_left_out(make_model, capsys, monkeypatch):
    monkeypatch.setattr(probes, "SHORT", {})
    found = probe(make_model(max_position_embeddings=900), items=1, lengths=(800, 1024))
    assert [score.task for score in found.scores] == ["needle, 800 tokens", "two hops, 800 tokens"]
    assert "1024 tokens are left out: there are 900 positions" in capsys.readouterr().err


def test_a_length_without_room_for_the_question_is_refused(make_model):
    with pytest.raises(td.TruedepthError, match="no room in 100 tokens"):
        probe(make_model(), items=1, lengths=(100,))
