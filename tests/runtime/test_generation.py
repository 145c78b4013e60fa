from __future__ import annotations

import itertools

import pytest
import torch

import truedepth as td
from truedepth.runtime import generation
from truedepth.runtime.generation import own_text

TEMPLATE = "{% for m in messages %}the {{ m['content'] }} on{% endfor %}"


def answer(*arguments, **options):
    return generation.answer(*arguments, **options).text


@pytest.fixture
def loaded(make_model):
    return td.load(make_model())


def greedy(loaded, text, steps):
    """The likeliest tokens after a text, from full forward passes."""
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    start = ids.shape[1]
    for _ in range(steps):
        ids = torch.cat([ids, loaded.model(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == loaded.tokenizer.eos_token_id:
            break
    return loaded.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_the_answer_is_what_follows_the_prompt(loaded):
    assert answer(loaded, "the cat", max_new_tokens=9) == greedy(loaded, "the cat", 9)


def test_a_chat_template_is_used_unless_raw(loaded):
    loaded.tokenizer.chat_template = TEMPLATE
    chat = answer(loaded, "cat", max_new_tokens=9)
    raw = answer(loaded, "cat", max_new_tokens=9, raw=True)
    assert chat == greedy(loaded, "the cat on", 9)
    assert raw == greedy(loaded, "cat", 9)
    assert chat != raw


def test_temperature_samples(loaded):
    def sample(seed, temperature):
        torch.manual_seed(seed)
        return answer(loaded, "the cat", max_new_tokens=12, temperature=temperature)

    assert sample(1, 2.0) == sample(1, 2.0) != sample(2, 2.0)
    assert sample(1, 1e-4) == sample(2, 1e-4) == answer(loaded, "the cat", max_new_tokens=12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(make_model, loaded, temperature):
    broken = td.load(make_model())
    broken.model.lm_head.weight.data[0, 0] = float("nan")
    for options in ({}, {"draft": loaded}):
        with pytest.raises(td.TruedepthError, match=r"logits of .* are not finite") as caught:
            answer(broken, "the cat", temperature=temperature, **options)
        assert caught.value.exit_code == 1


def test_streaming_prints_the_answer(loaded, capsys):
    text = answer(loaded, "the cat", max_new_tokens=9, stream=True)
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("groups", [[], [(1, 2), (3, 4)]])
@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_what_a_draft_proposes_is_checked(loaded, make_model, tmp_path, groups, draft_tokens):
    td.convert(make_model(), tmp_path / "out", td.Plan(6, groups))
    draft = td.load(tmp_path / "out")
    found = generation.answer(
        loaded, "the cat", draft=draft, draft_tokens=draft_tokens, max_new_tokens=24
    )
    assert found.text == greedy(loaded, "the cat", 24)
    alone = generation.answer(loaded, "the cat", max_new_tokens=24)
    assert found.tokens == alone.tokens == alone.passes
    assert alone.accepted == alone.drafted == 0
    assert found.tokens == found.passes + found.accepted
    assert found.accepted <= found.drafted <= found.passes * draft_tokens
    if not groups:  # the original proposes: all stands
        assert found.passes == -(-found.tokens // (draft_tokens + 1))


def test_checked_tokens_are_the_originals_on_twenty_prompts(loaded, make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", td.Plan(6, [(0, 1), (2, 3), (4, 5)]))
    draft = td.load(tmp_path / "out")
    words = ["the", "cat", "sat", "on", "mat", "and", "then", "hat", "a", "dog"]
    prompts = [f"{first} {second}" for first, second in itertools.permutations(words, 2)][::4][:20]
    texts, proposed, stand = set(), 0, 0
    for prompt in prompts:
        alone = generation.answer(loaded, prompt, max_new_tokens=16)
        found = generation.answer(loaded, prompt, draft=draft, max_new_tokens=16)
        assert found.ids == alone.ids
        texts.add(found.ids)
        proposed, stand = proposed + found.drafted, stand + found.accepted
    assert len(prompts) == 20 and len(texts) > 10  # they are 20 questions, not one
    assert stand < proposed  # and the draft is another model


def test_a_draft_with_other_tokens_is_refused(loaded, make_model):
    draft = td.load(make_model())
    draft.tokenizer.add_tokens("brouhaha")
    with pytest.raises(td.TruedepthError, match=r"cannot draft for .*: their vocabularies differ"):
        generation.answer(loaded, "the cat", draft=draft)


@torch.no_grad()
def test_own_text_is_drawn_from_the_models_distribution(loaded):
    # As many windows as are written at a time, and some more.
    ids = own_text(loaded, 80, 24, seed=3)
    assert ids.shape == (80, 24)
    assert not torch.isin(ids, torch.tensor(loaded.tokenizer.all_special_ids)).any()
    assert torch.equal(ids, own_text(loaded, 80, 24, seed=3))
    assert not torch.equal(ids, own_text(loaded, 80, 24, seed=4))
    logits = loaded.model(ids).logits[:, :-1].float()
    logits[..., loaded.tokenizer.all_special_ids] = -torch.inf
    logp = logits.log_softmax(-1)
    nll = -logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
    gap = (nll - entropy).flatten()
    assert gap.mean().abs() < 4 * gap.std() / len(gap) ** 0.5
    assert len(ids[:, 0].unique()) > 50


def test_own_text_begins_as_the_tokenizer_begins_texts(loaded, monkeypatch):
    from truedepth.runtime import generation

    monkeypatch.setattr(generation, "beginning", lambda _: [7])
    assert (own_text(loaded, 3, 8)[:, 0] == 7).all()
