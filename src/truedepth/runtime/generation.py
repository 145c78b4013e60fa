"""Text that a model generates: an answer to a prompt, or samples without a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from truedepth.errors import TruedepthError
from truedepth.options import Bounds, checked
from truedepth.progress import progress_bar
from truedepth.runtime.loading import Loaded
from truedepth.text import beginning

OWN_TEXT_BATCH = 64  # windows generated in one batch
DRAFT_TOKENS = 2


@dataclass(frozen=True)
class Answer:
    """The generated text, and what it took to generate it."""

    text: str
    """The text without the prompt."""

    ids: tuple[int, ...]
    """Its token ids, including special tokens."""

    seconds: float
    """Wall-clock time of the generation, including the prompt."""

    passes: int
    """Forward passes of the model itself (not the draft), including the one over the prompt."""

    drafted: int = 0
    """Tokens that the draft model proposed."""

    @property
    def tokens(self) -> int:
        """Number of tokens generated."""
        return len(self.ids)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were accepted: every pass adds one token besides these."""
        return self.tokens - self.passes if self.drafted else 0

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-compatible data."""
        return {**asdict(self), "tokens": self.tokens, "accepted": self.accepted}


@checked
@torch.inference_mode()
def answer(
    loaded: Loaded,
    prompt: str,
    *,
    draft: Loaded | None = None,
    draft_tokens: Annotated[int, Bounds(1)] = DRAFT_TOKENS,
    max_new_tokens: Annotated[int, Bounds(1)] = 128,
    temperature: Annotated[float, Bounds(0)] = 0.0,
    raw: bool = False,
    stream: bool = False,
) -> Answer:
    """Generate the model's answer to a prompt.

    Args:
        loaded: The model.
        prompt: A user's message if the tokenizer has a chat template, else text to continue.
        draft: A faster model that proposes tokens, several of which the model checks in one pass
            (speculative decoding). Greedy text is still the model's own, up to rounding; sampled
            text is still drawn from the model's distribution.
        draft_tokens: Largest number of tokens that the draft proposes at a time.
        max_new_tokens: Largest length of the answer, in tokens.
        temperature: 0 always takes the most likely token; above 0, tokens are sampled.
        raw: Continue the prompt as it is, even if the tokenizer has a chat template.
        stream: Print the answer while it is generated.

    Raises:
        TruedepthError: The prompt is empty, the draft has another vocabulary, or a draft is used
            and one of the two models runs in llama.cpp.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    if not prompt.strip():
        raise TruedepthError("The prompt is empty; give some text.")
    for each in (loaded, draft) if draft is not None else ():
        if each.model._is_stateful:
            raise TruedepthError(
                f"{each.source.name} runs in llama.cpp, which cannot draft or check tokens here;"
                " give the checkpoint that it was exported from."
            )
    if raw or not tokenizer.chat_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if stream:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if draft is not None:
        if draft.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise TruedepthError(
                f"{draft.source.name} cannot draft for {loaded.source.name}: their vocabularies"
                " differ. Give a draft with the same tokenizer."
            )
        draft.model.generation_config.update(
            num_assistant_tokens=draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        options["assistant_model"] = draft.model
    ids = inputs["input_ids"].to(model.device)
    mask = inputs["attention_mask"].to(model.device)
    with ExitStack() as stack:
        passes = stack.enter_context(_counted(model))
        drafted = stack.enter_context(_counted(draft.model)) if draft else [0]
        start = time.perf_counter()
        output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)
        seconds = time.perf_counter() - start
    written = output[0, ids.shape[1] :]
    return Answer(
        text=str(tokenizer.decode(written, skip_special_tokens=True)).strip(),
        ids=tuple(written.tolist()),
        seconds=seconds,
        passes=passes[0],
        drafted=drafted[0],
    )


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """Count a model's forward passes, in a list of one number."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    hook = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


@torch.inference_mode()
def own_text(loaded: Loaded, windows: int, window: int, seed: int = 0) -> Tensor:
    """Sample text from the model without a prompt; it resembles the text it was trained on.

    Every window starts with a token drawn uniformly from the vocabulary and continues with samples
    from the model's own distribution (temperature 1, no top-k or top-p). Special tokens are never
    sampled. The same seed gives the same text on the same machine.

    Args:
        loaded: The model.
        windows: Number of windows.
        window: Tokens per window.
        seed: Random seed of the sampling.

    Returns:
        `[windows, window]` int64 token ids; each window starts with the BOS token if the tokenizer
        begins texts with one.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    special = sorted(set(tokenizer.all_special_ids))
    usual = torch.ones(min(len(tokenizer), model.config.vocab_size), dtype=torch.bool)
    usual[[token for token in special if token < len(usual)]] = False
    begun = beginning(tokenizer)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=window,
        min_length=window,
        suppress_tokens=special,
        pad_token_id=special[0] if special else 0,
    )
    written = []
    with torch.random.fork_rng(), progress_bar("Writing text", windows) as advance:
        torch.manual_seed(seed)
        for start in range(0, windows, OWN_TEXT_BATCH):
            count = min(OWN_TEXT_BATCH, windows - start)
            first = torch.multinomial(usual.float(), count, replacement=True)[:, None]
            prefix = torch.tensor(begun, dtype=torch.int64).expand(count, len(begun))
            ids = torch.cat([prefix, first], 1).to(model.device)
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=sampling
            )
            written.append(output.cpu())
            advance(count)
    return torch.cat(written)
