"""A prompt as tokens: as it is, or as a user's message through the chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from truedepth.errors import TruedepthError, reason_of
from truedepth.progress import note
from truedepth.sources.source import Source
from truedepth.text import check_characters, check_embedded, positions_of


def prompt_ids(source: Source, prompt: str, raw: bool) -> list[int]:
    """The tokens that a model is given for a prompt.

    Args:
        source: The model.
        prompt: A user's message if the tokenizer has a chat template, else text to continue.
        raw: Take the prompt as it is, even if there is a chat template.

    Raises:
        TruedepthError: The prompt is empty or no UTF-8, the chat template fails or leaves the
            prompt out, the model has no embedding for a token, or no position for an answer.
    """
    if not prompt.strip():
        raise TruedepthError("The prompt is empty; give some text.")
    check_characters(prompt, "The prompt")
    if raw or not source.tokenizer.chat_template:
        ids = _plain(source, prompt)
    else:
        ids = _chat(source, prompt)
    check_embedded(source, ids)
    positions = positions_of(source.config)
    if positions is not None and len(ids) >= positions:
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


def _chat(source: Source, prompt: str) -> list[int]:
    """The chat template's tokens around a prompt.

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
    other = "".join("y" if letter == "x" else "x" for letter in prompt)
    failed: Exception | None = None
    for form in _FORMS:
        try:
            ids, compared = (_rendered(source, form(text)) for text in (prompt, other))
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


def _rendered(source: Source, content: Any) -> list[int]:
    rendered = source.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
    )
    return list(rendered["input_ids"])
