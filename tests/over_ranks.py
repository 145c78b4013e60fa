"""What each of two tensor-parallel ranks finds of models in a directory.

Tests call `found_over_two_ranks`, which runs this file by torchrun.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_models import torchrun

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def found_over_two_ranks(
    where: Path, cases: Iterable[str], ids: Tensor, *also: str
) -> list[dict[str, dict[str, Any]]]:
    """What two ranks find, by rank and case: `logits`, and the number of `all_reduces` of a pass.

    The embedding's all-reduce, if it is shared out, is not counted.

    Args:
        where: The directory of the models; it is written to.
        cases: The names of the models.
        ids: `[batch, length]` token ids.
        also: What else to find: `tokens` that are generated greedily, the `gradient` of the third
            layer's map that its FFN writes with, `fused` for the logits and all-reduces of the
            fused model, or why it cannot be fused.
    """
    torch.save((list(cases), ids, also), where / "asked")
    subprocess.run([*torchrun(2), __file__, str(where)], check=True)
    return [torch.load(where / f"found.{rank}") for rank in (0, 1)]


def _passed(model: Any, ids: Tensor) -> tuple[Tensor, int]:
    """Logits of a pass, and its all-reduces."""
    from truedepth.speed.collectives import watched

    embedding = model.get_input_embeddings().weight
    shared = getattr(embedding, "to_local", lambda: embedding)().shape != embedding.shape
    with torch.no_grad(), watched() as traffic:
        logits = model(input_ids=ids).logits
    return logits, traffic.calls["all_reduce"] - shared


def _found(path: str, ids: Tensor, also: Iterable[str]) -> dict[str, Any]:
    """What a rank finds of a model."""
    import transformers
    from transformers.distributed import DistributedConfig

    import truedepth as td

    config = transformers.AutoConfig.from_pretrained(path)
    auto: Any = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))
    logits, all_reduces = _passed(model, ids)
    found: dict[str, Any] = {"logits": logits, "all_reduces": all_reduces}
    if "tokens" in also:
        with torch.no_grad():
            found["tokens"] = model.generate(ids, **GREEDY)
    if "gradient" in also:
        model(ids, labels=ids).loss.backward()
        ffn = model.model.layers[2].mlp
        weight = (getattr(ffn, "down_proj", None) or ffn.c_proj).weight
        found["gradient"] = weight.grad.full_tensor()
    if "fused" in also:
        try:
            found["fused"] = _passed(td.fuse(model), ids)
        except td.TruedepthError as error:
            found["fused"] = str(error)
    return found


def _main(where: str) -> None:
    cases, ids, also = torch.load(f"{where}/asked")
    found = {case: _found(f"{where}/{case}", ids, also) for case in cases}
    torch.save(found, f"{where}/found.{torch.distributed.get_rank()}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
