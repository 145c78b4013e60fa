"""What a student is trained toward: the original beside it, or its predictions kept on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from truedepth.progress import progress_bar
from truedepth.runtime.output_head import OutputHead

CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}  # whose logits are in memory at a time

Outputs = tuple[Tensor, ...]
"""`[windows, length, hidden]`: the embedding, then what every layer gives."""


class Reference(Protocol):
    """The original's predictions at the positions of some windows, all but the last of each."""

    def kl(self, chunk: slice, logits: Tensor) -> Tensor:
        """`[positions]` τ² KL(original ‖ student), from the student's logits there."""

    def nll(self, chunk: slice, targets: Tensor) -> Tensor:
        """`[positions]` of the tokens that came, `targets`, at temperature 1."""

    def best(self, chunk: slice) -> Tensor:
        """`[positions]` most likely tokens."""


class Teacher(Protocol):
    """Gives references."""

    def look(
        self, ids: Tensor, number: Tensor, temperature: float, hidden: bool
    ) -> tuple[Reference, Outputs]:
        """The predictions for some windows, and if asked for what layers give.

        Args:
            ids: `[windows, length]` int64.
            number: `[windows]` int64, by which windows are told apart.
            temperature: τ
            hidden: Whether outputs of layers are wanted.
        """


class Original:
    """The model itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Of a model on the device of its inputs."""
        self._model = model

    @torch.no_grad()
    def look(
        self, ids: Tensor, number: Tensor, temperature: float, hidden: bool
    ) -> tuple[Reference, Outputs]:
        """As a teacher's."""
        states, outputs = run(self._model, ids, hidden)
        return _Whole(self._model, states, temperature), outputs


class _Whole:
    """Predictions computed from the last hidden states, when they are asked for."""

    def __init__(self, model: PreTrainedModel, states: Tensor, temperature: float) -> None:
        self._head, self._states = OutputHead(model), states
        self._temperature = temperature
        self._last: tuple[slice, Tensor] | None = None  # a chunk is asked for several times

    @torch.no_grad()
    def logits(self, chunk: slice) -> Tensor:
        """`[positions, vocabulary]` float32."""
        if self._last is None or self._last[0] != chunk:
            self._last = None
            self._last = chunk, self._head(self._states[chunk]).float()
        return self._last[1]

    def kl(self, chunk: slice, logits: Tensor) -> Tensor:
        reference = _log_probabilities(self.logits(chunk), self._temperature)
        ours = _log_probabilities(logits, self._temperature)
        share = reference.exp()
        kl: Tensor = torch.linalg.vecdot(share, reference) - torch.linalg.vecdot(share, ours)
        return self._temperature**2 * kl

    def nll(self, chunk: slice, targets: Tensor) -> Tensor:
        return cross_entropy(self.logits(chunk), targets, reduction="none")

    def best(self, chunk: slice) -> Tensor:
        return self.logits(chunk).argmax(-1)


class KeptPredictions:
    """The most likely next tokens at every position, computed before training.

    All other tokens count as one, so the KL from these is a lower bound of the KL.
    """

    def __init__(
        self, directory: Path, windows: int, length: int, count: int, temperature: float
    ) -> None:
        """Open the files, or make them.

        Args:
            directory: Where they are.
            windows: That are numbered from 0.
            length: Tokens a window.
            count: Tokens kept at a position.
            temperature: Of the predictions.
        """
        directory.mkdir(parents=True, exist_ok=True)

        def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            size = torch.Size(shape).numel()
            path = directory / name
            # Taken in advance, a full disk is an error here and not a crash at a later write.
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

        shape = (windows, length - 1, count)
        self._tokens = mapped("tokens.int32", shape, torch.int32)
        self._values = mapped("values.float16", shape, torch.float16)
        self._nll = mapped("nll.float32", shape[:2], torch.float32)
        self._done = mapped("done.uint8", (windows,), torch.uint8)
        self._temperature = temperature

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, ids: Tensor, first: int = 0, step: int = 1) -> None:
        """Compute what is not there yet.

        Args:
            model: The original, where it computes.
            ids: `[windows, length]`, of any integer type.
            first: Of several processes, this one's number.
            step: And how many there are: each takes windows of its own.
        """
        missing = [number for number in range(first, len(ids), step) if not self._done[number]]
        count = self._tokens.shape[-1]
        with progress_bar("Predictions of the original", len(missing)) as advance:
            for number in missing:
                window = ids[number : number + 1].to(model.device, torch.int64)
                states, _ = run(model, window, False)
                whole, targets = _Whole(model, states, 1.0), window[0, 1:]
                for chunk in chunks(targets):
                    logp = _log_probabilities(whole.logits(chunk), self._temperature)
                    values, tokens = logp.topk(count)
                    self._values[number, chunk] = values.half().cpu()
                    self._tokens[number, chunk] = tokens.int().cpu()
                    self._nll[number, chunk] = whole.nll(chunk, targets[chunk]).cpu()
                self._done[number] = 1
                advance(1)

    def look(
        self, ids: Tensor, number: Tensor, temperature: float, hidden: bool
    ) -> tuple[Reference, Outputs]:
        """As a teacher's; at the temperature that was kept, and without outputs."""
        rows = number.cpu()
        kept = (each[rows].flatten(0, 1) for each in (self._tokens, self._values, self._nll))
        tokens, values, nll = (each.to(ids.device) for each in kept)
        return _Likeliest(tokens.long(), values.float(), nll, self._temperature), ()


class _Likeliest:
    def __init__(self, tokens: Tensor, values: Tensor, nll: Tensor, temperature: float) -> None:
        self._tokens, self._values, self._nll = tokens, values, nll
        self._temperature = temperature

    def kl(self, chunk: slice, logits: Tensor) -> Tensor:
        reference = _with_rest(self._values[chunk])
        ours = _log_probabilities(logits, self._temperature).gather(-1, self._tokens[chunk])
        kl = (reference.exp() * (reference - _with_rest(ours))).sum(-1)
        return self._temperature**2 * kl

    def nll(self, chunk: slice, targets: Tensor) -> Tensor:
        return self._nll[chunk]

    def best(self, chunk: slice) -> Tensor:
        return self._tokens[chunk, 0]


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _with_rest(values: Tensor) -> Tensor:
    """Log probabilities `[positions, count]`, and behind them that of all other tokens."""
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([values, rest], -1)


def run(model: PreTrainedModel, ids: Tensor, hidden: bool) -> tuple[Tensor, Outputs]:
    """The last hidden states `[windows · (length - 1), hidden]`, and if asked for all outputs."""
    output: Any = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
    return output.last_hidden_state[:, :-1].flatten(0, 1), output.hidden_states or ()


def chunks(targets: Tensor) -> list[slice]:
    """Of positions whose logits are in memory together."""
    size = CHUNK_TOKENS.get(targets.device.type, CHUNK_TOKENS["cuda"])
    return [slice(start, start + size) for start in range(0, len(targets), size)]
