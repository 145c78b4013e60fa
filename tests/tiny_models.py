"""Small random models, and the layer-parallel formula written out plainly."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

ModelMaker = Callable[..., Path]


def random_model(config: Any, seed: int = 0) -> Any:
    """A model whose every parameter matters: gains and biases are as random as the matrices."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) * 1.5 + 0.25)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=0.12)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens, `<end>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the hat " * 8], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def random_ids(batch: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    """`[batch, length]` token ids, none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, TINY["vocab_size"], (batch, length), generator=generator)


def left_padded_logits(model: Any, ids: Tensor) -> Tensor:
    """A model's logits of texts `[batch, length]` that are padded by three tokens on the left."""
    padding = torch.zeros(len(ids), 3, dtype=torch.int64)
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=positions)
    return padded.logits[:, 3:]


def reference_logits(
    original: Any, ids: Tensor, groups: Sequence[Sequence[int]], window: int | None = None
) -> Tensor:
    """Layer Parallelism as the paper writes it, with the original's own layers and norms.

    a = x + Σ_i A_i(N_i x)        y = a + Σ_i F_i(N'_i a)

    With a window no token sees further back than so many, itself included.
    """
    stages = [[f"{kind}{layer}" for layer in group] for group in groups for kind in "AF"]
    return staged_logits(original, ids, stages, window)


@torch.no_grad()
def staged_logits(
    original: Any, ids: Tensor, stages: Sequence[Sequence[str]], window: int | None = None
) -> Tensor:
    """Stages of sub-layers, such as `["F2", "A3"]`: y = x + Σ_s s(N_s x), one after another."""
    body = original.model
    x = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = body.rotary_emb(x, position_ids=positions)
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    if window is not None:
        mask = mask + torch.full((length, length), float("-inf")).tril(-window)
    for stage in stages:
        y = x.clone()
        for name in stage:
            layer = body.layers[int(name[1:])]
            if name[0] == "A":
                normed = layer.input_layernorm(x)
                y += layer.self_attn(
                    hidden_states=normed, position_embeddings=rotary, attention_mask=mask
                )[0]
            else:
                y += layer.mlp(layer.post_attention_layernorm(x))
        x = y
    return original.lm_head(body.norm(x))


def torchrun(processes: int) -> list[str]:
    """A command line that begins so many processes, on a port of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, f"--nproc-per-node={processes}", f"--master-port={port}"]
