"""Text that a model generates: an answer to a prompt, or samples without a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

from truedepth.errors import TruedepthError, reason_of
from truedepth.options import Bounds, checked
from truedepth.progress import note, progress_bar
from truedepth.runtime.generation_config import checked_config, end_tokens, followed, replaced
from truedepth.runtime.loading import Loaded
from truedepth.runtime.prompt import prompt_ids
from truedepth.sources.source import Source
from truedepth.text import beginning, check_embedded, positions_of

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
        TruedepthError: The prompt cannot be used (see `prompt_ids`) or generation fails, the draft
            has another vocabulary, or a draft is used and one of the two models runs in llama.cpp.
    """
    model, source = loaded.model, loaded.source
    if draft is not None:
        _check_draft(draft, loaded)
    given = prompt_ids(source, prompt, raw)
    own = followed(model.generation_config, source, sampled=temperature > 0)
    positions = positions_of(source.config)
    length = max_new_tokens if positions is None else min(max_new_tokens, positions - len(given))
    config = _config_of_answer(loaded, own.settings, len(given), length, temperature)
    options: dict[str, Any] = {"generation_config": config}
    streamer = TextStreamer(source.tokenizer, skip_prompt=True, skip_special_tokens=True)
    # Several tokens can come at a time from a draft, and some of them from behind a stop string.
    at_once = draft is not None and bool(own.stop_strings)
    if stream and not at_once:
        options["streamer"] = streamer
    ids = torch.tensor([given], device=model.device)
    with ExitStack() as stack:
        stack.enter_context(_errors(source, own.settings))
        stops = _StopStrings(source, own.stop_strings, len(given)) if own.stop_strings else None
        options["stopping_criteria"] = StoppingCriteriaList([stops] if stops else [])
        options["logits_processor"] = LogitsProcessorList([_Numbers(source)])
        stack.enter_context(replaced(model, GenerationConfig()))
        if draft is not None:
            stack.enter_context(replaced(draft.model, _config_of_draft(draft_tokens)))
            options["assistant_model"] = draft.model
        passes = stack.enter_context(_counted(model))
        drafted = stack.enter_context(_counted(draft.model)) if draft else [0]
        start = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = time.perf_counter() - start
        written = output[0, len(given) : stops.end if stops else None].tolist()
        text = str(source.tokenizer.decode(written, skip_special_tokens=True)).strip()
    if stream and at_once:
        print(text, flush=True)
    if own.ignored:
        said = ", ".join(f"{name} {value!r}" for name, value in own.ignored.items())
        note(f"the answer does not follow {said} in the generation config of {source.name}.")
    ended = bool(stops and stops.end) or written[-1] in (own.settings["eos_token_id"] or ())
    if len(written) == length < max_new_tokens and not ended:
        note(
            f"the answer stops after {length} of {max_new_tokens} tokens, where the {positions}"
            f" positions of {source.name} end."
        )
    return Answer(text, tuple(written), seconds, passes[0], drafted[0])


def _check_draft(draft: Loaded, loaded: Loaded) -> None:
    for each in (loaded, draft):
        if each.model._is_stateful:
            raise TruedepthError(
                f"{each.source.name} runs in llama.cpp, which cannot draft or check tokens here;"
                " give the checkpoint that it was exported from."
            )
    tokens, sizes = zip(
        *((each.tokenizer.get_vocab(), each.model.config.vocab_size) for each in (draft, loaded)),
        strict=True,
    )
    if tokens[0] != tokens[1] or sizes[0] != sizes[1]:
        raise TruedepthError(
            f"{draft.source.name} cannot draft for {loaded.source.name}: their vocabularies"
            " differ. Give a draft with the same tokenizer."
        )


def _config_of_answer(
    loaded: Loaded, settings: dict[str, Any], given: int, length: int, temperature: float
) -> GenerationConfig:
    """The config of one answer of at most `length` tokens to a prompt of `given` tokens."""
    settings = dict(settings)
    for name, most in (("min_new_tokens", length), ("min_length", given + length)):
        if isinstance(settings.get(name), int):
            settings[name] = min(settings[name], most)
    if temperature > 0:
        settings["temperature"] = temperature
    return checked_config(
        loaded.source,
        **settings,
        do_sample=temperature > 0,
        max_new_tokens=length,
        use_cache=not loaded.model._is_stateful,  # llama.cpp keeps a cache of its own
    )


def _config_of_draft(tokens: int) -> GenerationConfig:
    return GenerationConfig(
        num_assistant_tokens=tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


class _Numbers(LogitsProcessor):  # type: ignore[misc]
    """Refuses logits that are not numbers, among which there is no likeliest token."""

    def __init__(self, source: Source) -> None:
        self._name = source.name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise TruedepthError(
                f"The logits of {self._name} are not finite numbers; try --dtype float32.", 1
            )
        return scores


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a text with the first token that completes one of some strings."""

    def __init__(self, source: Source, strings: Sequence[str], given: int) -> None:
        self._complete = StopStringCriteria(source.tokenizer, list(strings))
        self._seen = given
        self.end: int | None = None
        """Length of the text with that token; None while there is none."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        lengths = range(self._seen + 1, input_ids.shape[1] + 1)
        self._seen = input_ids.shape[1]
        if self.end is None:
            ends = (n for n in lengths if self._complete(input_ids[:, :n], scores).all())
            self.end = next(ends, None)
        return torch.full(input_ids.shape[:1], self.end is not None, device=input_ids.device)


@contextmanager
def _errors(source: Source, settings: Mapping[str, Any]) -> Iterator[None]:
    """Errors of transformers as one sentence, which names the settings that a file gave."""
    try:
        yield
    except (TruedepthError, OSError):  # the latter from what the answer is streamed to
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TruedepthError(
            f"There is not enough memory to generate with {source.name}: {reason_of(error)}", 1
        ) from error
    except Exception as error:
        given = [f"{name} {settings[name]!r}" for name in settings if name != "eos_token_id"]
        said = f" with {', '.join(given)} in its generation config" if given else ""
        raise TruedepthError(
            f"{source.name} cannot generate{said}: {reason_of(error)}", 1
        ) from error


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
def continuations(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float = 0.0,
) -> list[list[int]]:
    """The model's continuations of prompts, a batch at a time.

    Of the model's generation config only the end tokens are read.

    Args:
        loaded: The model.
        prompts: Token ids.
        max_new_tokens: Largest length of a continuation; it ends at the model's last position too.
        batch_size: Prompts per batch; they are padded on the left.
        temperature: 0 takes the most likely token always; above 0, tokens are sampled from the
            model's own distribution at that temperature, by torch's random state.

    Returns:
        Token ids; the last one is an end token where the model ended its text.

    Raises:
        TruedepthError: Generation fails.
    """
    model = loaded.model
    ends = end_tokens(model.generation_config, loaded.source)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    found: list[list[int]] = [[] for _ in prompts]
    positions = positions_of(loaded.source.config)
    with (
        progress_bar("Answering", len(prompts)) as advance,
        _errors(loaded.source, {}),
        replaced(model, GenerationConfig()),
    ):
        for batch, room in _batches(prompts, max_new_tokens, batch_size, positions):
            config = GenerationConfig(
                do_sample=temperature > 0,
                max_new_tokens=room,
                eos_token_id=ends or None,
                pad_token_id=0,
                **sampling,
            )
            longest = max(len(prompts[number]) for number in batch)
            rows = [[0] * (longest - len(prompts[n])) + list(prompts[n]) for n in batch]
            mask = [[0] * (longest - len(prompts[n])) + [1] * len(prompts[n]) for n in batch]
            output = model.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                logits_processor=LogitsProcessorList([_Numbers(loaded.source)]),
                generation_config=config,
            )
            for number, written in zip(batch, output[:, longest:].tolist(), strict=True):
                ended = (at + 1 for at, token in enumerate(written) if token in ends)
                found[number] = written[: next(ended, len(written))]
            advance(len(batch))
    return found


def _batches(
    prompts: Sequence[Sequence[int]], longest: int, batch_size: int, positions: int | None
) -> Iterator[tuple[list[int], int]]:
    """Numbers of prompts of similar length, and how many tokens may follow them.

    A prompt without room for the longest continuation is alone, so it shortens no other.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    roomy = [n for n in order if positions is None or len(prompts[n]) + longest <= positions]
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size], longest
    for number in order[len(roomy) :]:
        assert positions is not None
        yield [number], positions - len(prompts[number])


@torch.inference_mode()
def own_text(loaded: Loaded, windows: int, window: int, seed: int = 0) -> Tensor:
    """Sample text from the model without a prompt; it resembles the text it was trained on.

    Of the model's generation config only the end tokens are read.

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

    Raises:
        TruedepthError: Generation fails.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    special = sorted(set(tokenizer.all_special_ids))
    usual = torch.ones(min(len(tokenizer), model.config.vocab_size), dtype=torch.bool)
    usual[[token for token in special if token < len(usual)]] = False
    begun = beginning(tokenizer)
    check_embedded(loaded.source, begun)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=window,
        min_length=window,
        suppress_tokens=special,
        # These are not sampled either, as no text is shorter than `min_length`.
        eos_token_id=end_tokens(model.generation_config, loaded.source) or None,
        pad_token_id=special[0] if special else 0,
    )
    written = []
    with (
        torch.random.fork_rng(),
        progress_bar("Writing text", windows) as advance,
        _errors(loaded.source, {}),
        replaced(model, GenerationConfig()),
    ):
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
