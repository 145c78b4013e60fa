"""Prompts, from files, and as tokens: as they are, or through the chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from truedepth.errors import TruedepthError, reason_of
from truedepth.progress import note
from truedepth.sources.source import Source
from truedepth.text import (
    TEXT_SUFFIXES,
    check_characters,
    check_embedded,
    positions_of,
    read_lines,
)

BUILT_IN = "those that come with truedepth"

Prompt = str | Sequence[Mapping[str, str]]
"""A user's message, or the messages of a chat so far: each with its `role` and its `content`."""


def prompt_ids(source: Source, prompt: Prompt, raw: bool = False, room: bool = True) -> list[int]:
    """The tokens that a model is given for a prompt.

    Args:
        source: The model.
        prompt: A user's message, or those of a chat, if the tokenizer has a chat template, else
            text to continue.
        raw: Take the prompt as it is, even if there is a chat template.
        room: Refuse a prompt behind which there is no position for an answer.

    Raises:
        TruedepthError: The prompt is empty or no UTF-8, there are messages and no chat template,
            the template fails or leaves the prompt out, the model has no embedding for a token, or
            no position for an answer.
    """
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not asked.strip():
        raise TruedepthError("The prompt is empty; give some text.")
    check_characters(asked, "The prompt")
    if not raw and source.tokenizer.chat_template:
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = _chat(source, said)
    elif isinstance(prompt, str):
        ids = _plain(source, prompt)
    else:
        raise TruedepthError(
            f"The tokenizer of {source.name} has no chat template for the messages of a chat; give"
            " prompts that are text."
        )
    check_embedded(source, ids)
    positions = positions_of(source.config)
    if room and positions is not None and len(ids) >= positions:
        raise TruedepthError(
            f"The prompt has {len(ids)} tokens, and {source.name} has {positions} positions for"
            " prompt and answer together; give a shorter prompt."
        )
    if source.tokenizer.chat_template == "" and not raw:
        note(f"the chat template of {source.name} is empty; the prompt is continued as it is.")
    return ids


def _plain(source: Source, prompt: str) -> list[int]:
    try:
        ids: list[int] = source.tokenizer(prompt)["input_ids"]
    except Exception as error:  # tokenizers of every kind raise errors of every kind
        raise TruedepthError(
            f"The tokenizer of {source.name} cannot split the prompt: {reason_of(error)}"
        ) from error
    if not ids:
        raise TruedepthError(
            f"The tokenizer of {source.name} finds no tokens in the prompt; give another."
        )
    return ids


def _chat(source: Source, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The chat template's tokens around messages, of which the last is the prompt.

    Some templates take a message's text in parts, as chats with pictures give it. They fail on
    plain text or pass over it, so every form is tried on a second prompt too: where both look the
    same, the model would not see the prompt.
    """
    templates = source.tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(map(str, templates)))
        raise TruedepthError(
            f"The tokenizer of {source.name} has chat templates named {names} and none named"
            " default; --raw (raw=True in Python) continues the prompt as it is."
        )
    *before, last = messages
    other = "".join("y" if letter == "x" else "x" for letter in last["content"])
    failed: Exception | None = None
    for form in _FORMS:
        try:
            ids, compared = (
                _rendered(source, [*before, {**last, "content": text}], form)
                for text in (last["content"], other)
            )
        except Exception as error:  # jinja2's, and whatever the expressions of a template raise
            failed = failed or error
            continue
        if ids != compared:
            return ids
    reason = "leaves the prompt out" if failed is None else f"fails: {reason_of(failed)[:-1]}"
    raise TruedepthError(
        f"The chat template of {source.name} {reason}; --raw (raw=True in Python) continues the"
        " prompt as it is."
    ) from failed


_FORMS: tuple[Callable[[str], Any], ...] = (
    lambda text: text,
    lambda text: [{"type": "text", "text": text}],
)


def _rendered(
    source: Source, messages: Sequence[Mapping[str, str]], form: Callable[[str], Any]
) -> list[int]:
    rendered = source.tokenizer.apply_chat_template(
        [{**each, "content": form(each["content"])} for each in messages],
        add_generation_prompt=True,
        return_dict=True,
    )
    return list(rendered["input_ids"])


def read_prompts(path: str | Path | None) -> list[Prompt]:
    """The prompts of a file, in its order.

    Args:
        path: A `.jsonl` file with a `prompt`, or with the `messages` of a chat, in every line, or
            a `.txt` file with a prompt in every line; None for those that come with the package.

    Raises:
        TruedepthError: The file cannot be read, or a line is not a prompt; the error names it.
    """
    if path is None:
        text = files("truedepth.runtime").joinpath("prompts.yaml").read_text(encoding="utf-8")
        built_in: list[Prompt] = yaml.safe_load(text)
        return built_in
    path = Path(path).expanduser()
    if path.suffix not in TEXT_SUFFIXES:
        raise TruedepthError(
            f"{path} is neither a .txt nor a .jsonl file; save the prompts as one of these."
        )
    prompts = [
        line.strip() if path.suffix == ".txt" else _of_line(line, f"{path}, line {number}")
        for number, line in read_lines(path, "the prompts")
    ]
    if not prompts:
        raise TruedepthError(f"{path} contains no prompts; write one in every line.")
    return prompts


def _of_line(line: str, where: str) -> Prompt:
    """The prompt in a line of JSON."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TruedepthError(f"{where}: not valid JSON.") from error
    if not isinstance(item, dict) or not item.keys() & {"prompt", "messages"}:
        raise TruedepthError(f"{where}: lacks the key 'prompt', or 'messages' for a chat.")
    prompt = item.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if "prompt" in item:
        raise TruedepthError(f"{where}: 'prompt' must be a non-empty string.")
    messages = item["messages"]
    fits = isinstance(messages, list) and all(
        isinstance(each, dict)
        and all(isinstance(each.get(key), str) for key in ("role", "content"))
        for each in messages
    )
    if not fits or not messages or messages[-1]["role"] != "user":
        raise TruedepthError(
            f"{where}: 'messages' must be a list of objects with a 'role' and a 'content', of which"
            " the last is the user's."
        )
    found: Prompt = [{"role": each["role"], "content": each["content"]} for each in messages]
    return found
