"""What a model writes: an answer to a prompt, or text of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from truedepth.errors import TruedepthError
from truedepth.loading import Loaded
from truedepth.progress import progress_bar
from truedepth.text import beginning

OWN_TEXT_BATCH = 64  # windows written at a time


@torch.inference_mode()
def answer(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    raw: bool = False,
    stream: bool = False,
) -> str:
    """The model's answer to a prompt, without the prompt.

    Args:
        loaded: The model.
        prompt: A user's message where the tokenizer has a chat template, else text to continue.
        max_new_tokens: The answer's length at most.
        temperature: 0 takes the likeliest token always; above, tokens are sampled.
        raw: Continue the prompt as it is even where there is a chat template.
        stream: Print the answer as it comes.

    Raises:
        TruedepthError: The prompt is empty.
    """
    tokenizer = loaded.tokenizer
    if not prompt.strip():
        raise TruedepthError("The prompt is empty.")
    if raw or not tokenizer.chat_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = inputs["input_ids"].to(loaded.model.device)
    output = loaded.model.generate(
        ids,
        attention_mask=inputs["attention_mask"].to(loaded.model.device),
        max_new_tokens=max_new_tokens,
        streamer=streamer if stream else None,
        **sampling,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@torch.inference_mode()
def own_text(loaded: Loaded, windows: int, window: int, seed: int = 0) -> Tensor:
    """Text that the model writes by itself, which is text like it was trained on.

    Every window begins with a token drawn from the whole vocabulary and goes on by sampling from
    the model's own distribution; special tokens are left out. The same seed gives the same text on
    the same machine.

    Args:
        loaded: The model.
        windows: How many.
        window: Tokens a window.
        seed: Of the sampling.

    Returns:
        `[windows, window]` int64 token ids, with the BOS token before them where the tokenizer
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
