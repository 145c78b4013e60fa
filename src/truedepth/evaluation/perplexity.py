"""Perplexity of a model, and its distance from its original on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import perplexity_of, window_measures
from truedepth.options import Bounds, checked
from truedepth.progress import progress_bar
from truedepth.runtime.loading import Loaded, load, opened, source_of
from truedepth.sources.source import Source
from truedepth.text import DEFAULT_TEXT, default_text, read_text, token_windows, window_of


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured: one model on a text, or a model and its original on one text."""

    model: str
    """The model's name and where it was found."""

    text: str
    windows: int
    window: int
    """Tokens per window; all but the first are predicted."""

    tokens: int
    """Number of tokens predicted."""

    nll: float
    """Mean negative log-likelihood, in nats per token."""

    against: str | None = None
    """The original's name and where it was found."""

    against_nll: float | None = None
    """NLL of the original, in nats per token."""

    excess: float | None = None
    """Excess loss `nll - against_nll`, in nats per token."""

    excess_stderr: float | None = None
    """Standard error of the excess loss, over windows; None for a single window."""

    kl: float | None = None
    """Mean KL(original ‖ model), in nats per token."""

    top1_agreement: float | None = None
    """Share of positions at which both models have the same most likely next token."""

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return perplexity_of(self.nll)

    @property
    def against_perplexity(self) -> float | None:
        """exp(against_nll); None without an original."""
        return None if self.against_nll is None else perplexity_of(self.against_nll)

    def to_dict(self) -> dict[str, Any]:
        """All fields and both perplexities as JSON-compatible data."""
        return asdict(self) | {
            "perplexity": self.perplexity,
            "against_perplexity": self.against_perplexity,
        }


@checked
def perplexity(
    model: str | Path | Source | Loaded,
    *,
    against: str | Path | Source | Loaded | None = None,
    text: str | Path | None = None,
    window: Annotated[int | None, Bounds(2)] = None,
    windows: Annotated[int | None, Bounds(1)] = 64,
    batch_size: Annotated[int, Bounds(1)] = 4,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Perplexity:
    """Measure a model's perplexity, and with `against` its distance from the original.

    Args:
        model: The model to measure: anything that `load` takes, or a `Loaded`.
        against: The original, run on the same tokens; default: the model is measured alone.
        text: A `.txt` or `.jsonl` file; default: the documentation that comes with Python.
        window: Tokens per window. Default: 512, or the model's positions if these are fewer.
        windows: Use at most this many windows, from the beginning of the text; None for all.
        batch_size: Windows per forward pass.
        device: Device of the models, unless they are loaded already.
        dtype: Dtype of the models, unless they are loaded already.

    Raises:
        TruedepthError: The text is shorter than one window, the window is longer than the model's
            context, the tokenizers or vocabularies differ, or a model's logits are not finite.
    """
    content = default_text() if text is None else read_text(text)
    # Texts and tokenizers come first: a fault in them is reported before any model is loaded.
    models = [opened(each) for each in (model, against) if each is not None]
    sources = [source_of(each) for each in models]
    size = min(window_of(each, window) for each in sources)
    ids, *others = [token_windows(each, content, size, windows) for each in sources]
    if any(not torch.equal(ids, other) for other in others):
        raise TruedepthError(
            f"{' and '.join(each.label for each in sources)} split the text into different tokens;"
            " only models with the same tokenizer can be compared."
        )
    loaded = [load(each, device=device, dtype=dtype) for each in models]
    _check_vocabularies(loaded)
    ours, theirs = loaded[0], loaded[1] if len(loaded) > 1 else None
    measured = []
    with progress_bar("Measuring", len(ids)) as advance:
        for batch in torch.split(ids, batch_size):
            measured.append(_measure(ours, theirs, batch))
            advance(len(batch))
    return _summary(
        torch.cat(measured),
        size,
        names=[each.label for each in sources],
        text=DEFAULT_TEXT if text is None else str(text),
    )


def _check_vocabularies(loaded: Sequence[Loaded]) -> None:
    sizes = [each.model.config.vocab_size for each in loaded]
    if len(set(sizes)) > 1:
        raise TruedepthError(
            f"The models' vocabularies have {sizes[0]} and {sizes[1]} entries; only models with the"
            " same vocabulary can be compared."
        )


@torch.inference_mode()
def _measure(ours: Loaded, theirs: Loaded | None, ids: Tensor) -> Tensor:
    """`[batch, 4]` float64 means over each window: NLL, original's NLL, KL, top-1 agreement."""
    logits = _logits(ours, ids)
    other = _logits(theirs, ids) if theirs else None
    rows = []
    for index, targets in enumerate(ids[:, 1:]):
        original = None if other is None else other[index].__getitem__
        rows.append(window_measures(targets, [logits[index].__getitem__], original)[0])
    return torch.stack(rows)


def _logits(loaded: Loaded, ids: Tensor) -> Tensor:
    """Logits `[batch, window - 1, vocabulary]` that predict every token but the first."""
    logits: Tensor = loaded.model(ids.to(loaded.model.device), use_cache=False).logits
    return logits[:, :-1]


def _summary(rows: Tensor, window: int, names: Sequence[str], text: str) -> Perplexity:
    nll, against_nll, kl, top1 = rows.mean(0).tolist()
    if not math.isfinite(nll) or not math.isfinite(against_nll):
        raise TruedepthError(
            "A model's logits are not finite numbers; try --dtype float32.", exit_code=1
        )
    count = len(rows)
    plain = Perplexity(
        model=names[0],
        text=text,
        windows=count,
        window=window,
        tokens=count * (window - 1),
        nll=nll,
    )
    if len(names) == 1:
        return plain
    difference = rows[:, 0] - rows[:, 1]
    return replace(
        plain,
        against=names[1],
        against_nll=against_nll,
        excess=nll - against_nll,
        excess_stderr=(difference.std() / count**0.5).item() if count > 1 else None,
        kl=kl,
        top1_agreement=top1,
    )
