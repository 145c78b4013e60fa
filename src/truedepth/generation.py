"""One prompt, one answer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TextStreamer

from truedepth.errors import TruedepthError
from truedepth.loading import Loaded


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
