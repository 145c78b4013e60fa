"""A loaded model as lm-evaluation-harness takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from truedepth.errors import TruedepthError
from truedepth.runtime.generation_config import replaced
from truedepth.runtime.loading import Loaded
from truedepth.text import check_embedded


def harness_model(loaded: Loaded, batch_size: int | str) -> Any:
    """The harness's model; its `cut` counts the requests that were too long for the model."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):  # type: ignore[misc]
        cut = 0

        @property
        def eot_token_id(self) -> int:
            end = self.tokenizer.eos_token_id
            return int(self.prefix_token_id if end is None else end)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
        ) -> Any:
            lengths = (len(context) + len(continuation) for _, context, continuation in requests)
            self.cut += sum(length > self.max_length + 1 for length in lengths)
            return super()._loglikelihood_tokens(requests, **options)

        def tok_batch_encode(
            self, strings: Sequence[str], *, left_truncate_len: int | None = None, **options: Any
        ) -> Any:
            if left_truncate_len:
                self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
            return super().tok_batch_encode(strings, left_truncate_len=left_truncate_len, **options)

    return Harness(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)


@contextmanager
def as_the_harness_needs(loaded: Loaded) -> Iterator[None]:
    """Let a model be scored by its own distribution, and refuse tokens that it cannot embed.

    Of its generation config only the end tokens stay. Texts of a batch are padded with a token that
    it can embed.

    Raises:
        TruedepthError: The tokenizer has neither a BOS nor an EOS token, or gives a token that the
            model has no embedding for.
    """
    model, tokenizer, rows = loaded.model, loaded.tokenizer, loaded.model.config.vocab_size
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TruedepthError(
            f"The tokenizer of {loaded.source.name} has neither a BOS nor an EOS token, and"
            " lm-evaluation-harness needs one of them; name one in its tokenizer_config.json."
        )
    pad = tokenizer.pad_token
    for name in ("pad", "unk", "eos", "bos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None and token < rows:
            tokenizer.pad_token = getattr(tokenizer, f"{name}_token")
            break

    def check(_: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        ids = given[0] if given else named["input_ids"]
        check_embedded(loaded.source, [int(ids.max())])

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    own = model.generation_config
    config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    try:
        with replaced(model, config):
            yield
    finally:
        hook.remove()
        tokenizer.pad_token = pad
