"""Vocabularies of GGUF files, as metadata: byte-level BPE and SentencePiece's, both trained."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from token_texts import texts

Fields = dict[str, Any]

GGML = "tokenizer.ggml"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPECIAL = {
    "<|begin|>": CONTROL,
    "<|stop|>": CONTROL,
    "<｜end▁of▁sentence｜>": CONTROL,  # noqa: RUF001
    "<特别>": CONTROL,
    "<|a b|>": CONTROL,
    "<tool>": USER,
    "[X]  [Y]": USER,
    "<|im_end|>": CONTROL,
}
"""Names of which most lie outside the byte alphabet."""

WHOLE = (
    " naïve",
    "東京タワー",
    "Привет",
    " (a",
    "don't",
    "1234567",
    " café",
    "123456",
    "xx",
    "x y",
)
"""Words that get tokens without merges."""


def byte_name(text: str) -> str:
    """A text as byte-level BPE writes it."""
    return "".join(piece for piece, _ in BYTES.pre_tokenize_str(text))


@cache
def _trained(level: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges of BPE that never splits text, so that every split matters."""
    tokenizer, found = Tokenizer(models.BPE()), [text for text in texts() if "\0" not in text]
    if level == "bytes":
        tokenizer.pre_tokenizer = BYTES
    else:
        found = ["▁" + text.replace(" ", "▁") for text in found]
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=sorted(BYTES.alphabet()) if level == "bytes" else [],
        limit_alphabet=500,
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(found, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return tuple(sorted(model["vocab"], key=model["vocab"].get)), tuple(map(tuple, model["merges"]))


def byte_level(pre: str | None = "llama-bpe") -> Fields:
    """Metadata of byte-level BPE, with special tokens and words that no merges lead to."""
    trained, merges = _trained("bytes")
    whole = [name for name in map(byte_name, WHOLE) if name not in trained]
    names = [*trained, *whole, *SPECIAL]
    return {
        f"{GGML}.model": "gpt2",
        f"{GGML}.pre": pre,
        f"{GGML}.tokens": names,
        f"{GGML}.token_type": [SPECIAL.get(name, NORMAL) for name in names],
        f"{GGML}.merges": [" ".join(pair) for pair in merges],
        f"{GGML}.bos_token_id": names.index("<|begin|>"),
        f"{GGML}.eos_token_id": names.index("<|stop|>"),
    }


def sentencepiece(special: dict[str, int] | None = None) -> Fields:
    """Metadata of SentencePiece's BPE, with special tokens of its own and `special`."""
    trained, merges = _trained("characters")
    ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(merges)])}
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | (special or {})
    characters = [name for name in trained if name not in ranks]
    runs = ["▁" * size for size in range(2, 17)]  # all of one score, as in Llama 2 and Mistral
    pieces = [*sorted(ranks.keys() - {*runs}, key=ranks.__getitem__), *characters]
    names = [*special, *[f"<0x{byte:02X}>" for byte in range(256)], *pieces, *runs]
    scores = [0.0] * (len(special) + 256) + [-float(index) for index in range(len(pieces))]
    return {
        f"{GGML}.model": "llama",
        f"{GGML}.pre": "default",
        f"{GGML}.tokens": names,
        f"{GGML}.scores": scores + [-1e9] * len(runs),
        f"{GGML}.token_type": [
            *special.values(),
            *[BYTE] * 256,
            *[NORMAL] * (len(pieces) + len(runs)),
        ],
    }


def small(tokens: list[str] | None = None, merges: list[str] | None = None) -> Fields:
    """Metadata of byte-level BPE without merges that matter, and `<end>` first."""
    names = ["<end>", *sorted(BYTES.alphabet()), *(tokens or ["Ġt"])]
    return {
        f"{GGML}.model": "gpt2",
        f"{GGML}.pre": "gpt-2",
        f"{GGML}.tokens": names,
        f"{GGML}.token_type": [CONTROL] + [NORMAL] * (len(names) - 1),
        f"{GGML}.merges": merges or ["Ġ t"],
        f"{GGML}.eos_token_id": 0,
    }


def add_fields(writer: gguf.GGUFWriter, fields: Fields) -> None:
    """Write metadata; those of None are left out."""
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)


def write_vocabulary(path: Path, fields: Fields, rows: int | None = None) -> Path:
    """A file of the llama architecture with a vocabulary and an embedding, and no layers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    add_fields(writer, fields)
    rows = len(fields[f"{GGML}.tokens"]) if rows is None else rows
    writer.add_tensor("token_embd.weight", np.zeros((rows, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
