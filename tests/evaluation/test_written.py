"""What a model writes against what its original writes, and prompts from files."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
import torch

import truedepth as td
from truedepth.evaluation.generation import ends_in_loop, generation
from truedepth.runtime.generation import continuations
from truedepth.runtime.prompt import prompt_ids, read_prompts

PROMPTS = ["the cat", "sat on the mat and", "then the hat", "the"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def pair(make_model, tmp_path):
    """An original and its conversion."""
    source = make_model()
    td.convert(source, tmp_path / "out", td.Plan.staggered(6, 1, 5))
    return source, tmp_path / "out"


def alone(loaded, ids, length):
    """One prompt's most likely continuation, with the whole text in every pass."""
    written = []
    while len(written) < length and written[-1:] != [0]:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([ids + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def test_batches_are_answered_as_single_prompts(pair):
    for path in pair:
        loaded = td.load(path)
        ids = [prompt_ids(loaded.source, prompt) for prompt in PROMPTS]
        assert continuations(loaded, ids, 20, batch_size=3) == [
            alone(loaded, each, 20) for each in ids
        ]


def test_answers_end_at_the_last_position_and_shorten_no_other(make_model):
    loaded = td.load(make_model(max_position_embeddings=24))
    ids = [list(range(3, 3 + length)) for length in (3, 20, 4, 23)]
    found = continuations(loaded, ids, 12)
    rooms = [12, 4, 12, 1]
    assert found == [alone(loaded, *each) for each in zip(ids, rooms, strict=True)]


def test_the_tokenizers_end_ends_an_answer_where_the_model_names_none(make_model):
    loaded = td.load(make_model())
    ids = [[5, 6, 7]]
    (written,) = continuations(loaded, ids, 12)
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(written[2])
    assert continuations(loaded, ids, 12) == [written[:3]]


def test_a_model_follows_itself(pair, prompts):
    source, _ = pair
    found = generation(source, against=source, prompts=prompts, max_new_tokens=20)
    assert found.agreement == found.identical == found.itself == 1
    assert found.original == found.written
    assert found.followed >= found.written.length


def test_figures_are_those_of_the_answers(pair, prompts):
    source, out = pair
    found = generation(out, against=source, prompts=prompts, max_new_tokens=20)
    ours, theirs = (td.load(each) for each in (out, source))
    hits, followed = [], []
    for prompt in PROMPTS:
        ids = prompt_ids(theirs.source, prompt)
        answer = alone(theirs, ids, 20)
        mine = alone(ours, ids, 20)
        same = [one == other for one, other in zip(answer, mine, strict=False)]
        followed.append(same.index(False) if False in same else len(answer))
        for at, token in enumerate(answer):
            hits.append(alone(ours, ids + answer[:at], 1) == [token])
    assert found.agreement == pytest.approx(sum(hits) / len(hits))
    assert found.followed == pytest.approx(sum(followed) / len(followed))
    assert found.identical == followed.count(20) / len(PROMPTS) < 1
    assert found.answers == 4


def test_errors_are_those_of_answers_to_the_same_prompts(pair, tmp_path):
    """Against runs of every prompt alone; a token that the original writes ends answers."""
    source = shutil.copytree(pair[0], tmp_path / "source")
    out, loaded = pair[1], td.load(source)
    end = alone(loaded, prompt_ids(loaded.source, PROMPTS[0]), 9)[-1]
    for path in (source, out):
        config = path / "generation_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [end]}))

    def measured(prompts):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        return generation(out, against=source, prompts=tmp_path / "prompts.txt", max_new_tokens=40)

    both, singles = measured(PROMPTS), [measured([prompt]) for prompt in PROMPTS]
    assert singles[0].difference_stderr is singles[0].agreement_stderr is None
    for name in ("length", "ended", "loops"):
        paired = [getattr(one.written, name) - getattr(one.original, name) for one in singles]
        assert getattr(both.difference, name) == pytest.approx(statistics.mean(paired))
        error = statistics.stdev(paired) / len(paired) ** 0.5
        assert getattr(both.difference_stderr, name) == pytest.approx(error)
    assert both.difference_stderr.length > 0
    tokens = [one.original.length + one.original.ended for one in singles]
    assert len(set(tokens)) > 1
    apart = [(o.agreement - both.agreement) * n for o, n in zip(singles, tokens, strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5 / statistics.mean(tokens)
    assert both.agreement_stderr == pytest.approx(error)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([7] * 16, True),
        ([7] * 15, False),
        ([1, 2, 3] * 6, True),
        ([9, 9, *([1, 2, 3] * 6)], True),
        ([*([1, 2, 3] * 6), 4], False),
        ([*range(64)] * 3, True),
        ([*range(64)] * 2, False),
        ([*range(65)] * 3, False),
        ([], False),
    ],
)
def test_loops(ids, loops):
    assert ends_in_loop(ids) == loops


def test_a_model_that_loops_is_shown_as_looping(make_model, prompts):
    """A model that adds nothing to its embeddings says the same word again and again."""
    loaded = td.load(make_model())
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "_proj" in name:
                parameter.zero_()
        loaded.model.lm_head.weight.copy_(loaded.model.model.embed_tokens.weight)
        loaded.model.model.norm.weight.fill_(1)
    found = generation(loaded, prompts=prompts, max_new_tokens=40)
    assert found.written.loops == 1 and found.written.length == 40 and found.written.ended == 0


def test_an_end_token_ends_an_answer(make_model, prompts):
    loaded = td.load(make_model())
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()  # all tokens are alike, and the first of them ends
    found = generation(loaded, prompts=prompts)
    assert found.written.ended == 1 and found.written.length == found.written.loops == 0


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("p.jsonl", '{"text": "a"}', "line 2: lacks the key 'prompt', or 'messages' for a chat"),
        ("p.jsonl", '{"prompt": " "}', "line 2: 'prompt' must be a non-empty string"),
        ("p.jsonl", "{", "line 2: not valid JSON"),
        ("p.jsonl", '{"messages": []}', "line 2: 'messages' must be a list"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 2: 'messages' must be a list"),
        (
            "p.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "of which the last is the user's",
        ),
        ("p.csv", "a", "neither a .txt nor a .jsonl file"),
        ("p.txt", "", "contains no prompts"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, line, said):
    (tmp_path / name).write_text("\n" + line)
    with pytest.raises(td.TruedepthError, match=said):
        read_prompts(tmp_path / name)


def test_prompts_of_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}))
    assert read_prompts(tmp_path / "p.jsonl") == [messages]
    assert len(read_prompts(None)) == 40


def test_messages_go_through_the_chat_template(make_model):
    source = td.open_source(make_model())
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(td.TruedepthError, match="no chat template for the messages"):
        prompt_ids(source, messages)
    source.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    assert source.tokenizer.decode(prompt_ids(source, messages)) == "system: Be kind.\nuser: Hi\n"
