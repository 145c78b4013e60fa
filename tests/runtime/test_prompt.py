"""Prompts: chat templates, text that is none, tokens and positions that a model lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest

import truedepth as td
from tiny_models import byte_tokenizer
from truedepth import progress
from truedepth.runtime.generation import answer
from truedepth.runtime.prompt import prompt_ids

RAW = r"; --raw \(raw=True in Python\) continues the prompt as it is"


@pytest.fixture
def source(make_model, monkeypatch):
    """A source whose tokenizer and config a test may change."""
    monkeypatch.setattr(progress, "_noted", set())
    found = td.open_source(make_model())
    return replace(found, config=dict(found.config))


def ids_of(source, text):
    return source.tokenizer(text, add_special_tokens=False)["input_ids"]


EACH = "{% for m in messages %}"

RENDERED = {
    "text": (EACH + "<{{ m.role }}>{{ m.content }}{% endfor %}", "<user>a cat"),
    "the text changed": (EACH + "{{ m.content | upper }}{% endfor %}", "A CAT"),
    "JSON": ("{{ messages[0].content | tojson }}", '"a cat"'),
    "parts": (
        EACH + "-{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endfor %}",
        "-a cat",
    ),
    "parts that must be": ("{{ messages[0].content[0]['text'] + '!' }}", "a cat!"),
    "parts in lines": (
        EACH + "{% for p in m.content %}+{{ p.text }}{% endfor %}{% endfor %}",
        "+a cat",
    ),
}


@pytest.mark.parametrize(("template", "text"), RENDERED.values(), ids=RENDERED)
def test_templates(source, template, text):
    source.tokenizer.chat_template = template
    assert prompt_ids(source, "a cat", raw=False) == ids_of(source, text)
    assert prompt_ids(source, "a cat", raw=True) == ids_of(source, "a cat")


def test_a_named_template(source):
    source.tokenizer.chat_template = {"rag": "x", "default": "{{ messages[0].content }}?"}
    assert prompt_ids(source, "a cat", raw=False) == ids_of(source, "a cat?")


BROKEN = {
    "raises": ("{{ raise_exception('A system message is\nneeded') }}", "fails: .*A system message"),
    "cut in an expression": (EACH + "{{ m['content'", "fails: TemplateSyntaxError"),
    "cut in a block": (EACH + "{{ m.content }}", "fails: TemplateSyntaxError: .*'endfor'"),
    "cut in a word": (EACH + "{{ m.content }}{% endfor %}{% if add_gen", "fails: Template"),
    "a filter that is not": ("{{ messages[0].content | bogus }}", "fails: .*bogus"),
    "a function that is not": ("{{ bogus() }}", "fails: UndefinedError"),
    "another message": ("{{ messages[1].content }}", "fails: UndefinedError"),
    "an error of Python": ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
    "no end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    "what must not be": ("{{ messages.__class__.__mro__ }}", "fails: SecurityError"),
    "nothing": ("{# nothing #}", "leaves the prompt out"),
    "white space": (" \n ", "leaves the prompt out"),
    "other text": ("hello", "leaves the prompt out"),
    "other messages": (
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
        "leaves the prompt out",
    ),
    "no template": (5, "fails: TypeError"),
}


@pytest.mark.parametrize(("template", "words"), BROKEN.values(), ids=BROKEN)
def test_templates_that_give_no_prompt(source, template, words):
    source.tokenizer.chat_template = template
    with pytest.raises(td.TruedepthError, match=f"chat template of .* {words}.*{RAW}") as caught:
        prompt_ids(source, "a cat", raw=False)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert prompt_ids(source, "a cat", raw=True) == ids_of(source, "a cat")


def test_templates_without_a_default(source):
    source.tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(td.TruedepthError, match=f"named rag, tool_use and none .*default{RAW}"):
        prompt_ids(source, "a cat", raw=False)


def test_a_tokenizer_that_renders_nothing(source, monkeypatch):
    source.tokenizer.chat_template = "x"
    monkeypatch.setattr(source.tokenizer, "apply_chat_template", lambda *_, **__: None)
    with pytest.raises(td.TruedepthError, match=f"fails: TypeError.*{RAW}"):
        prompt_ids(source, "a cat", raw=False)


def test_an_empty_template_is_none(source, capsys):
    source.tokenizer.chat_template = ""
    assert prompt_ids(source, "a cat", raw=False) == ids_of(source, "a cat")
    assert capsys.readouterr().err == (
        f"truedepth: note: the chat template of {source.name} is empty; the prompt is continued as"
        " it is.\n"
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"the \xff cat".decode("utf-8", "surrogateescape"), "the byte 0xff, which is not UTF-8"),
        ("the \ud83d cat", r"half of a character, \\ud83d, as its character 5"),
        (" \n", "is empty"),
    ],
)
def test_prompts_that_are_no_text(source, prompt, words):
    with pytest.raises(td.TruedepthError, match=f"^The prompt.*{words}"):
        prompt_ids(source, prompt, raw=True)


def test_a_null_is_a_character(source):
    assert prompt_ids(source, "a\0b", raw=True) == ids_of(source, "a\0b")


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda text: {"input_ids": []}, "finds no tokens in the prompt"),
        (lambda text: {"input_ids": [1, None]}, "no token for a part of the text"),
        (lambda text: {}["input_ids"], "cannot split the prompt: KeyError"),
    ],
)
def test_tokenizers_that_give_no_tokens(source, tokenizer, words):
    class Odd:
        chat_template = None

        def __call__(self, text):
            return tokenizer(text)

    with pytest.raises(td.TruedepthError, match=words):
        prompt_ids(replace(source, load_tokenizer=Odd), "a cat", raw=False)


@pytest.mark.parametrize("raw", [False, True])
def test_tokens_that_the_model_has_no_embedding_for(make_model, raw):
    """One more token than rows, from the prompt or from the chat template."""
    rows = len(byte_tokenizer())
    source = td.open_source(make_model(vocab_size=rows))
    source.tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    assert prompt_ids(source, "a cat", raw=True) == ids_of(source, "a cat")
    source.tokenizer.chat_template = "<|user|>{{ messages[0].content }}"
    words = rf"'<\|user\|>' the id {rows}, and .* embeddings for {rows} tokens"
    with pytest.raises(td.TruedepthError, match=words):
        prompt_ids(source, "a <|user|> cat" if raw else "a cat", raw=raw)


def test_a_prompt_needs_positions(source):
    prompt = "a cat sat on the mat"
    count = len(ids_of(source, prompt))
    for positions, fits in ((count - 1, False), (count, False), (count + 1, True), (None, True)):
        source.config["max_position_embeddings"] = positions
        if fits:
            assert prompt_ids(source, prompt, raw=True) == ids_of(source, prompt)
            continue
        words = f"prompt has {count} tokens, and .* has {positions} positions"
        with pytest.raises(td.TruedepthError, match=words):
            prompt_ids(source, prompt, raw=True)


@pytest.mark.parametrize("drafted", [False, True])
def test_an_answer_stops_where_the_positions_end(make_model, capsys, monkeypatch, drafted):
    monkeypatch.setattr(progress, "_noted", set())
    loaded = td.load(make_model(max_position_embeddings=12))
    draft = td.load(make_model(max_position_embeddings=12)) if drafted else None
    room = 12 - len(ids_of(loaded.source, "the cat"))
    found = answer(loaded, "the cat", max_new_tokens=99, draft=draft)
    assert found.tokens == room
    assert capsys.readouterr().err == (
        f"truedepth: note: the answer stops after {room} of 99 tokens, where the 12 positions of"
        f" {loaded.source.name} end.\n"
    )
    assert answer(loaded, "the cat", max_new_tokens=room).ids == found.ids
    assert capsys.readouterr().err == ""
