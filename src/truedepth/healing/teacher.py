"""What a student is trained toward: the original in memory, or its predictions on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from truedepth.files.scratch import mapped
from truedepth.progress import progress_bar
from truedepth.runtime.output_head import OutputHead

CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}  # positions whose logits are in memory at once

Outputs = tuple[Tensor, ...]
"""`[windows, length, hidden]` each: the embedding, then the output of every layer."""


class Reference(Protocol):
    """The original's predictions at all positions of some windows except the last of each."""

    def divergence(self, chunk: slice, logits: Tensor, form: float = 0.0) -> Tensor:
        """`[positions]` τ² divergence β in nats, from the student's logits there."""

    def nll(self, chunk: slice, targets: Tensor) -> Tensor:
        """`[positions]` NLL of the next tokens, `targets`, in nats at temperature 1."""

    def top1(self, chunk: slice) -> Tensor:
        """`[positions]` most likely next tokens."""


class Teacher(Protocol):
    """Predicts what the student is compared with."""

    def predict(
        self, ids: Tensor, number: Tensor, temperature: float, hidden: bool
    ) -> tuple[Reference, Outputs]:
        """The predictions for some windows and, on request, the outputs of all layers.

        Args:
            ids: `[windows, length]` int64.
            number: `[windows]` int64, the index of each window.
            temperature: The KL temperature τ.
            hidden: Whether to return the outputs of all layers; without them the tuple is empty.
        """


class Original:
    """A teacher that runs the original."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take the original, on the device of the windows that it will be given."""
        self._model = model

    @torch.no_grad()
    def predict(
        self, ids: Tensor, number: Tensor, temperature: float, hidden: bool
    ) -> tuple[Reference, Outputs]:
        """See `Teacher.predict`."""
        states, outputs = hidden_states(self._model, ids, hidden)
        return _Whole(self._model, states, temperature), outputs


class _Whole:
    """Predictions of all tokens, computed from the last hidden states when they are needed."""

    def __init__(self, model: PreTrainedModel, states: Tensor, temperature: float) -> None:
        self._head, self._states = OutputHead(model), states
        self._temperature = temperature
        self._last: tuple[slice, Tensor] | None = None  # a chunk is needed several times

    @torch.no_grad()
    def logits(self, chunk: slice) -> Tensor:
        """`[positions, vocabulary]` float32."""
        if self._last is None or self._last[0] != chunk:
            self._last = None
            self._last = chunk, self._head(self._states[chunk]).float()
        return self._last[1]

    def divergence(self, chunk: slice, logits: Tensor, form: float = 0.0) -> Tensor:
        reference = _log_probabilities(self.logits(chunk), self._temperature)
        ours = _log_probabilities(logits, self._temperature)
        return self._temperature**2 * _divergence(reference, ours, form)

    def nll(self, chunk: slice, targets: Tensor) -> Tensor:
        return cross_entropy(self.logits(chunk), targets, reduction="none")

    def top1(self, chunk: slice) -> Tensor:
        return self.logits(chunk).argmax(-1)


class KeptPredictions:
    """A teacher from files: the most likely next tokens at every position, with probabilities.

    They are computed before training. All other tokens count as one token, so the KL divergence
    that they give is a lower bound.
    """

    def __init__(
        self, directory: Path, windows: int, length: int, count: int, temperature: float
    ) -> None:
        """Open the files, or create them.

        Args:
            directory: The directory of the files; created if it does not exist.
            windows: Number of windows.
            length: Tokens per window.
            count: Tokens kept per position.
            temperature: The KL temperature τ.

        Raises:
            OSError: A file cannot be opened, or the disk is full.
        """
        directory.mkdir(parents=True, exist_ok=True)
        shape = (windows, length - 1, count)
        self._tokens = mapped(directory, "tokens.int32", shape, torch.int32)
        self._values = mapped(directory, "values.float16", shape, torch.float16)
        self._nll = mapped(directory, "nll.float32", shape[:2], torch.float32)
        self._done = mapped(directory, "done.uint8", (windows,), torch.uint8)
        self._temperature = temperature

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, ids: Tensor, first: int = 0, step: int = 1) -> None:
        """Compute the predictions that are not in the files yet.

        Args:
            model: The original, on the device to compute on.
            ids: `[windows, length]`, all windows, of any integer type.
            first: Index of this process. It computes every `step`-th window from this one on.
            step: Number of processes.
        """
        missing = [number for number in range(first, len(ids), step) if not self._done[number]]
        count = self._tokens.shape[-1]
        with progress_bar("Predictions of the original", len(missing)) as advance:
            for number in missing:
                window = ids[number : number + 1].to(model.device, torch.int64)
                states, _ = hidden_states(model, window, False)
                whole, targets = _Whole(model, states, 1.0), window[0, 1:]
                for chunk in chunks(targets):
                    logp = _log_probabilities(whole.logits(chunk), self._temperature)
                    values, tokens = logp.topk(count)
                    self._values[number, chunk] = values.half().cpu()
                    self._tokens[number, chunk] = tokens.int().cpu()
                    self._nll[number, chunk] = whole.nll(chunk, targets[chunk]).cpu()
                self._done[number] = 1
                advance(1)

    def predict(
        self, ids: Tensor, number: Tensor, temperature: float, hidden: bool
    ) -> tuple[Reference, Outputs]:
        """See `Teacher.predict`; `temperature` and `hidden` are ignored.

        The temperature is that of the files, and there are no outputs of layers.
        """
        rows = number.cpu()
        kept = (each[rows].flatten(0, 1) for each in (self._tokens, self._values, self._nll))
        tokens, values, nll = (each.to(ids.device) for each in kept)
        return _Likeliest(tokens.long(), values.float(), nll, self._temperature), ()


class _Likeliest:
    """Predictions of the most likely tokens, with all other tokens as one."""

    def __init__(self, tokens: Tensor, values: Tensor, nll: Tensor, temperature: float) -> None:
        self._tokens, self._values, self._nll = tokens, values, nll
        self._temperature = temperature

    def divergence(self, chunk: slice, logits: Tensor, form: float = 0.0) -> Tensor:
        reference = _with_rest(self._values[chunk])
        ours = _log_probabilities(logits, self._temperature).gather(-1, self._tokens[chunk])
        return self._temperature**2 * _divergence(reference, _with_rest(ours), form)

    def nll(self, chunk: slice, targets: Tensor) -> Tensor:
        return self._nll[chunk]

    def top1(self, chunk: slice) -> Tensor:
        return self._tokens[chunk, 0]


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _divergence(reference: Tensor, ours: Tensor, form: float) -> Tensor:
    """A divergence of distributions P, the original's, and Q, the student's, in nats.

    β = 0 is KL(P ‖ Q), β = 1 is KL(Q ‖ P), and between them it is the generalised Jensen-Shannon
    divergence β KL(P ‖ M) + (1 - β) KL(Q ‖ M), M = β P + (1 - β) Q (arXiv 2306.13649, section 2).

    Args:
        reference: `[positions, tokens]` log P.
        ours: `[positions, tokens]` log Q.
        form: β.

    Returns:
        `[positions]`.
    """
    if form == 0:
        return _kl(reference, ours)
    if form == 1:
        return _kl(ours, reference)
    mean = torch.logaddexp(reference + math.log(form), ours + math.log1p(-form))
    return form * _kl(reference, mean) + (1 - form) * _kl(ours, mean)


def _kl(of: Tensor, beside: Tensor) -> Tensor:
    share = of.exp()
    with torch.autocast(of.device.type, enabled=False):  # it would take the products in 16 bits
        kl: Tensor = torch.linalg.vecdot(share, of) - torch.linalg.vecdot(share, beside)
    return kl


def _with_rest(values: Tensor) -> Tensor:
    """Log probabilities `[positions, count]`, followed by that of all other tokens together."""
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([values, rest], -1)


def hidden_states(model: PreTrainedModel, ids: Tensor, all_layers: bool) -> tuple[Tensor, Outputs]:
    """A model's last hidden states and, on request, the outputs of all layers.

    Args:
        model: The student or the original.
        ids: `[windows, length]` int64.
        all_layers: Whether to return the outputs of all layers.

    Returns:
        `[windows · (length - 1), hidden]`, without the last position of each window; and the
        outputs, or an empty tuple.
    """
    output: Any = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=all_layers)
    return output.last_hidden_state[:, :-1].flatten(0, 1), output.hidden_states or ()


def chunks(targets: Tensor) -> list[slice]:
    """The positions in slices; the logits of one slice are in memory at once."""
    size = CHUNK_TOKENS.get(targets.device.type, CHUNK_TOKENS["cuda"])
    return [slice(start, start + size) for start in range(0, len(targets), size)]
