"""What the original says itself: its answers, what is kept of them, and what the student writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import truedepth as td
from truedepth import progress
from truedepth.healing.answers import BATCHES, Answering, first_sentences
from truedepth.healing.options import Healing, Objective, TextPart
from truedepth.healing.rollouts import rolled_out
from truedepth.healing.teacher import Original
from truedepth.runtime.generation import continuations
from truedepth.runtime.prompt import prompt_ids

LENGTH = 48
BATCH = BATCHES["cpu"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Every test says its notes anew."""
    monkeypatch.setattr(progress, "_noted", set())


@pytest.fixture(scope="module")
def source(make_model):
    return td.open_source(make_model())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"the {word}"} for word in ("cat", "dog on the mat", "mat")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answering(source, prompts, **options):
    options = {"text": (), "answer_tokens": 12, **options}
    options = Healing(own_answers=(TextPart(str(prompts)),), **options)
    return Answering(source, options, LENGTH, torch.device("cpu"), torch.float32)


def some(made, directory, count):
    (part,) = made.parts(directory)
    return [ids for ids, _ in zip(part.documents, range(count), strict=False)]


def test_answers_are_the_originals_own(source, prompts, tmp_path):
    found = some(answering(source, prompts, answer_temperature=0.0), tmp_path, 99)
    ids = [prompt_ids(source, json.loads(line)["prompt"]) for line in prompts.open()]
    answers = continuations(td.load(source, dtype=torch.float32), ids, 12)
    assert found == [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
    lines = [json.loads(line) for line in (tmp_path / "answers-1.jsonl").open()][1:]
    assert [line["prompt"] for line in lines] == ["the cat", "the dog on the mat", "the mat"]
    tokenizer = source.tokenizer
    assert [line["answer"] for line in lines] == [tokenizer.decode(each) for each in answers]


def test_sampled_answers_go_on_and_are_those_of_the_seed(source, prompts, tmp_path):
    made = [
        some(answering(source, prompts, seed=seed), tmp_path / name, 2 * BATCH)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert made[0] == made[1] != made[2]
    assert len(made[0]) == 2 * BATCH
    asked = prompt_ids(source, "the cat")
    first, again = (each[: len(asked)] for each in (made[0][0], made[0][3]))
    assert first == again == asked  # after the last prompt the first one again
    assert made[0][0] != made[0][3]


def test_answers_that_are_kept_are_not_written_again(source, prompts, tmp_path, monkeypatch):
    whole = some(answering(source, prompts), tmp_path / "whole", 3 * BATCH)
    some(answering(source, prompts), tmp_path / "cut", BATCH + 1)
    file = tmp_path / "cut" / "answers-1.jsonl"
    file.write_text(file.read_text()[:-20])  # killed while the second batch was written
    assert some(answering(source, prompts), tmp_path / "cut", 3 * BATCH) == whole
    monkeypatch.setattr("truedepth.healing.answers.continuations", None)  # would fail
    again = some(answering(source, prompts, keep_answers=tmp_path / "cut"), tmp_path, 3 * BATCH)
    assert again == whole


def test_answers_of_others_are_not_taken(source, prompts, tmp_path):
    some(answering(source, prompts), tmp_path, 1)
    with pytest.raises(td.TruedepthError, match="holds answers with another seed: 0, not 1"):
        some(answering(source, prompts, seed=1), tmp_path, 1)
    prompts.write_text(json.dumps({"prompt": "a cat"}))
    with pytest.raises(td.TruedepthError, match="holds answers to other prompts"):
        some(answering(source, prompts), tmp_path, 1)


def test_prompts_that_fill_the_window(source, prompts, tmp_path, capsys):
    prompts.write_text("\n".join(json.dumps({"prompt": "cat " * n}) for n in (3, 60)))
    found = some(answering(source, prompts, answer_temperature=0.0), tmp_path, 9)
    assert len(found) == 1
    assert "1 prompts fill a window of 48 tokens and are left out" in capsys.readouterr().err
    prompts.write_text(json.dumps({"prompt": "cat " * 60}))
    with pytest.raises(td.TruedepthError, match="No prompt leaves room for an answer in a window"):
        some(answering(source, prompts), tmp_path / "other", 9)


def test_a_prompt_longer_than_the_positions_is_left_out(make_model, prompts, tmp_path, capsys):
    """And the note comes where fewer prompts are needed than there are."""
    source = td.open_source(make_model(max_position_embeddings=LENGTH))
    prompts.write_text("\n".join(json.dumps({"prompt": "cat " * n}) for n in (60, *[3] * 99)))
    (part,) = answering(source, prompts).parts(tmp_path)
    documents = iter(part.documents)
    assert len(next(documents)) < LENGTH
    documents.close()
    assert "1 prompts fill a window of 48 tokens and are left out" in capsys.readouterr().err


def test_samples_are_those_of_a_part_and_a_pass(source, prompts, tmp_path):
    """No batch of any seed, part or pass is another's again."""
    prompts.write_text(json.dumps({"prompt": "the cat"}))
    options = {"text": (), "own_answers": (TextPart(str(prompts)), TextPart(str(prompts), 2.0))}
    seen = []
    for seed in (0, 1):
        made = Answering(
            source,
            Healing(**options, answer_tokens=12, seed=seed),
            LENGTH,
            torch.device("cpu"),
            torch.float32,
        )
        for part in made.parts(tmp_path / str(seed)):
            ids = [ids for ids, _ in zip(part.documents, range(3 * BATCH), strict=False)]
            seen += [str(ids[start : start + BATCH]) for start in range(0, 3 * BATCH, BATCH)]
    assert len({*seen}) == len(seen) == 12


def test_an_answer_that_fills_the_window_is_cut(source, prompts, tmp_path):
    found = some(answering(source, prompts, answer_tokens=99), tmp_path, 3)
    assert max(map(len, found)) == LENGTH


def test_first_sentences():
    texts = [
        "Go on. Two.",
        "  Is it 3.5 m? No",
        "",
        " \n\n ",
        "1.\n\nMr. Smith\nwent home! He ran.\n \nHe\n\nWe stay. So do they.",
        "word " * 100,
        "no end",
    ]
    found = list(first_sentences(texts))
    assert found[:2] == ["Go on.", "Is it 3.5 m?"]
    assert found[2:4] == ["Mr. Smith\nwent home!", "We stay."]
    assert found[4] == ("word " * 60).strip()
    assert found[5:] == ["no end"]


def test_prompts_from_the_text(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat. The dog did not.")
    options = Healing(
        text=(TextPart(str(text)),), own_answers=(TextPart.parse("text=3"),), answer_tokens=4
    )
    made = Answering(source, options, LENGTH, torch.device("cpu"), torch.float32)
    (part,) = made.parts(tmp_path)
    assert (part.title, part.weight) == ("answers to text", 3.0)
    asked = prompt_ids(source, "The cat sat.")
    assert next(iter(part.documents))[: len(asked)] == asked


def test_texts_take_turns_with_prompts(source, tmp_path):
    for name, text in (("a", "The cat sat.\n\nThe mat sat."), ("b", "The dog sat.")):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = tuple(TextPart(str(tmp_path / f"{name}.txt")) for name in "ab")
    made = answering(source, "text", text=texts, answer_temperature=0.0)
    some(made, tmp_path, 9)
    lines = [json.loads(line) for line in (tmp_path / "answers-1.jsonl").open()][1:]
    assert [line["prompt"] for line in lines] == ["The cat sat.", "The dog sat.", "The mat sat."]


def test_the_end_of_a_window_is_what_the_student_samples(source):
    """The tokens are those that inverse sampling by a window's own numbers gives."""
    student = td.load(source, dtype=torch.float32).model.train()
    ids = torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    number = torch.tensor([7, 3, 11, 5])
    found = rolled_out(student, ids, number, 6, 0.5, seed=1)
    assert student.training
    changed = (found != ids).any(1)
    assert 0 < changed.sum() < 4
    assert torch.equal(found[:, :-6], ids[:, :-6])
    alone = [
        rolled_out(student, ids[i : i + 1], number[i : i + 1], 6, 0.5, seed=1) for i in range(4)
    ]
    assert torch.equal(torch.cat(alone), found)
    assert not torch.equal(rolled_out(student, ids, number, 6, 1.0, seed=2), found)


def test_samples_follow_the_students_distribution(source):
    student = td.load(source, dtype=torch.float32).model
    ids = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    many, number = ids.expand(4000, -1), torch.arange(4000)
    found = rolled_out(student, many, number, 1, 1.0, seed=0)[:, -1]
    with torch.no_grad():
        expected = student(ids[:, :-1]).logits[0, -1].softmax(-1)
    counts = found.bincount(minlength=len(expected)) / 4000
    assert (counts - expected).abs().sum() < 2.5 * (expected * (1 - expected) / 4000).sqrt().sum()


@pytest.mark.parametrize("form", [0.0, 0.3, 1.0])
def test_divergences_are_as_written_down(source, make_model, form):
    model = td.load(source, dtype=torch.float32).model
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    reference, _ = Original(model).predict(ids, torch.arange(2), 1.0, False)
    logits = torch.randn(16, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        p = model(ids).logits[:, :-1].flatten(0, 1).softmax(-1)
    q = logits.softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = form * p + (1 - form) * q
    between = form * kl(p, m) + (1 - form) * kl(q, m)
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(form, between)
    torch.testing.assert_close(
        reference.divergence(slice(0, 16), logits, form), expected, rtol=1e-3, atol=1e-5
    )


def test_divergences_are_float32_under_autocast(source):
    """Autocast takes inner products in 16 bits, and a KL is a small difference of two."""
    model = td.load(source, dtype=torch.float32).model
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    reference, _ = Original(model).predict(ids, torch.arange(2), 1.0, False)
    logits = reference.logits(slice(0, 16))
    near = logits + 0.01 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    for form in (0.0, 0.3, 1.0):
        expected = reference.divergence(slice(0, 16), near, form)
        with torch.autocast("cpu", torch.bfloat16):
            found = reference.divergence(slice(0, 16), near, form)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)


def test_training_on_answers_and_on_policy(make_model, prompts, prose, options, tmp_path):
    td.convert(make_model(), tmp_path / "converted", td.Plan(6, [[1, 2], [4, 5]]))
    options = replace(
        options,
        own_answers=(TextPart(str(prompts)),),
        answer_share=0.25,
        answer_tokens=20,
        objective=Objective(divergence=0.5, on_policy=0.5, rollout=8),
    )
    found = []
    for name, micro in (("a", 2), ("b", 4)):
        done = td.heal(
            tmp_path / "converted",
            tmp_path / name,
            teacher=make_model(),
            healing=replace(options, micro_batch_size=micro),
        )
        found.append(done.curve[-1]["kl"])
        assert done.curve[-1]["kl"] < 0.9 * done.curve[0]["kl"]
    assert math.isclose(*found, rel_tol=1e-3)
    assert set(done.record.text) == {prose.name, "answers to prompts.jsonl"}
    assert done.record.text["answers to prompts.jsonl"] == pytest.approx(
        done.record.text[prose.name] / 3, abs=64
    )
