"""What a model writes, and how far it follows what its original writes.

Both answer the same prompts, always by the most likely token. Whether the model would go on as the
original did is asked at every token of the original's answers; the first "no" is where its own
answer leaves the original's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from truedepth.errors import TruedepthError
from truedepth.evaluation.scores import mean, stderr
from truedepth.options import Bounds, checked
from truedepth.runtime.generation import continuations
from truedepth.runtime.generation_config import end_tokens
from truedepth.runtime.loading import Loaded, load, opened, source_of
from truedepth.runtime.prompt import BUILT_IN, prompt_ids, read_prompts
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name

LONGEST = 64  # tokens of an n-gram that is looked for at the end of an answer
COPIES = 3  # that a loop has at least; so answers of 128 tokens show n-grams of up to 42
LEAST = 16  # tokens that a loop's copies have together at least


@dataclass(frozen=True)
class Written:
    """What answers are like: means over answers, or the standard errors of these means."""

    length: float
    """Number of tokens, without the end token."""

    ended: float
    """Share of answers that the model ended itself."""

    loops: float
    """Share of answers that end in a loop: an n-gram three times or more in a row."""


@dataclass(frozen=True)
class Generation:
    """What a model writes, and what its original writes, in answer to the same prompts."""

    model: str
    """The model's name and where it was found."""

    prompts: str
    answers: int
    """Number of prompts."""

    max_new_tokens: int
    dtype: str
    written: Written
    """What the model writes."""

    against: str | None = None
    """The original's name and where it was found."""

    original: Written | None = None
    """What the original writes."""

    agreement: float | None = None
    """Share of the original's tokens that the model finds most likely too."""

    agreement_stderr: float | None = None
    """Its standard error over answers, by the linearized ratio; None for a single answer."""

    followed: float | None = None
    """Mean number of tokens before the first difference."""

    identical: float | None = None
    """Share of answers without a difference."""

    itself: float | None = None
    """`agreement` of the original with itself: less than 1 where rounding, which is another for
    answers in a batch and for all tokens at once, decides between equally likely tokens."""

    difference: Written | None = None
    """`written` minus `original`."""

    difference_stderr: Written | None = None
    """Its standard errors, paired over prompts: both models answer the same ones. None for a
    single prompt."""

    def to_dict(self) -> dict[str, Any]:
        """All figures and settings as JSON-compatible data."""
        return asdict(self)


@checked
def generation(
    model: str | Path | Source | Loaded,
    *,
    against: str | Path | Source | Loaded | None = None,
    prompts: str | Path | None = None,
    max_new_tokens: Annotated[int, Bounds(1)] = 128,
    raw: bool = False,
    batch_size: Annotated[int, Bounds(1)] = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Generation:
    """Let a model answer prompts, and compare it with its original on the same ones.

    Args:
        model: The model: anything that `load` takes, or a `Loaded`.
        against: The original; default: the model alone.
        prompts: A `.jsonl` file with a `prompt`, or with `messages` of a chat, in every line, or a
            `.txt` file of one prompt a line; default: forty short ones that come with the package.
        max_new_tokens: Largest length of an answer.
        raw: Continue prompts as they are, even if the tokenizer has a chat template.
        batch_size: Prompts that are answered at once.
        device: Device of the models, unless they are loaded already.
        dtype: Dtype of the models, unless they are loaded already.

    Raises:
        TruedepthError: The file is malformed, a prompt is too long for a model, the models split
            prompts into different tokens, or one runs in llama.cpp.
    """
    asked = read_prompts(prompts)
    models = [opened(each) for each in (model, against) if each is not None]
    sources = [source_of(each) for each in models]
    ids, *others = [[prompt_ids(each, prompt, raw) for prompt in asked] for each in sources]
    if any(ids != other for other in others):
        raise TruedepthError(
            f"{' and '.join(each.label for each in sources)} split the prompts into different"
            " tokens; only models with the same tokenizer and chat template can be compared."
        )
    answers: list[list[list[int]]] = []
    found: list[list[Written]] = []
    hits: list[list[list[bool]]] = []
    for each in reversed(models):  # the original first: the model is compared with its answers
        loaded = load(each, device=device, dtype=dtype)
        if loaded.model._is_stateful:
            raise TruedepthError(
                f"{loaded.source.name} runs in llama.cpp, which answers one prompt at a time; give"
                " the checkpoint that it was exported from."
            )
        answers.append(continuations(loaded, ids, max_new_tokens, batch_size))
        ends = end_tokens(loaded.model.generation_config, loaded.source)
        found.append([_written(answer, ends) for answer in answers[-1]])
        if against is not None:
            agreed = [_agreed(loaded, *each) for each in zip(ids, answers[0], strict=True)]
            hits.append(agreed)
        computed = dtype_name(loaded.model.dtype)
        del loaded  # frees its memory before the next one is loaded
    plain = Generation(
        model=sources[0].label,
        prompts=BUILT_IN if prompts is None else str(prompts),
        answers=len(asked),
        max_new_tokens=max_new_tokens,
        dtype=computed,
        written=_over(mean, found[-1]),
    )
    if against is None:
        return plain
    itself, agreed = hits
    differences = _differences(*found)
    return replace(
        plain,
        against=sources[1].label,
        original=_over(mean, found[0]),
        agreement=_share(agreed),
        agreement_stderr=_share_stderr(agreed),
        followed=mean([([*each, False]).index(False) for each in agreed]),
        identical=mean([all(each) for each in agreed]),
        itself=_share(itself),
        difference=_over(mean, differences),
        difference_stderr=_over(stderr, differences) if len(differences) > 1 else None,
    )


def _share(hits: Sequence[Sequence[bool]]) -> float:
    """The share of hits among the tokens of all answers."""
    return sum(map(sum, hits)) / sum(map(len, hits))


def _share_stderr(hits: Sequence[Sequence[bool]]) -> float | None:
    """Its standard error over answers of unequal lengths (Cochran, Sampling Techniques, 6.3)."""
    share, length = _share(hits), mean([len(each) for each in hits])
    return stderr([(sum(each) - share * len(each)) / length for each in hits])


@torch.inference_mode()
def _agreed(loaded: Loaded, prompt: list[int], answer: list[int]) -> list[bool]:
    """At which tokens of an answer the model's most likely one is the same."""
    ids = torch.tensor([prompt + answer], device=loaded.model.device)
    found = loaded.model(ids[:, :-1], use_cache=False, logits_to_keep=len(answer))
    agreed: list[bool] = (found.logits[0].argmax(-1) == ids[0, len(prompt) :]).tolist()
    return agreed


def _written(answer: Sequence[int], ends: Sequence[int]) -> Written:
    """What one answer is like, given the tokens that end one."""
    ended = bool(answer) and answer[-1] in ends
    body = answer[:-1] if ended else answer
    return Written(len(body), ended, ends_in_loop(body))


def _differences(originals: Sequence[Written], models: Sequence[Written]) -> list[Written]:
    """How the model's answers differ from the original's, prompt by prompt."""
    return [
        Written(*map(operator.sub, astuple(model), astuple(original)))
        for original, model in zip(originals, models, strict=True)
    ]


def _over(figure: Callable[[list[float]], Any], answers: Sequence[Written]) -> Written:
    """A figure of many answers, such as their mean."""
    return Written(*(figure(list(column)) for column in zip(*map(astuple, answers), strict=True)))


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether tokens end in copies of one n-gram: three or more, of 16 tokens or more together."""
    for size in range(1, LONGEST + 1):
        span = size * max(COPIES, -(-LEAST // size))
        end = ids[-span:]
        if len(end) == span and end[size:] == end[:-size]:
            return True
    return False
