"""A layer-parallel checkpoint as the draft of its original: accepted tokens, and speed.

    python benchmarks/lossless.py ORIGINAL CKPT [CKPT…] --text FILE --json PATH
        [--draft-tokens 1,2,4] [--prompts 8] [--tokens 64] [--repetitions 3] [--dtype bfloat16]

The original continues the first 64 tokens of windows from all over the text, greedily, alone and
with each draft, in turn. `same_tokens` counts the prompts on which the tokens are the original's
own: all of them, except for ties within the rounding of the dtype. With one token drafted at a
time, a draft that costs the share c of the original's time pays if more than that share of its
tokens is accepted.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch

import truedepth as td
from rows import parser_of
from truedepth.cli.options import DType
from truedepth.runtime.device import default_device
from truedepth.runtime.generation import answer
from truedepth.tensors import dtype_name
from truedepth.text import read_text, token_windows

PROMPT = 64  # tokens


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("original")
    parser.add_argument("drafts", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--draft-tokens", default="1,2,4")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=DType, type=DType, default=DType.auto)
    arguments = parser.parse_args()
    dtype = arguments.dtype.torch()
    original = td.load(arguments.original, dtype=dtype)
    drafts = {name: td.load(name, dtype=dtype) for name in arguments.drafts}
    counts = [int(word) for word in arguments.draft_tokens.split(",")]
    windows = token_windows(original.source, read_text(arguments.text), PROMPT)
    windows = windows[:: max(1, len(windows) // arguments.prompts)][: arguments.prompts]
    prompts = [original.tokenizer.decode(ids, skip_special_tokens=True) for ids in windows]
    options: dict[str, Any] = {"max_new_tokens": arguments.tokens, "raw": True}
    ways: dict[tuple[str, int], dict[str, Any]] = {("", 0): {}}
    for name, draft in drafts.items():
        for count in counts:
            ways[name, count] = {"draft": draft, "draft_tokens": count}
    taken: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    seen: dict[tuple[str, int], list[Any]] = {}
    for run in range(1 + arguments.repetitions):  # the first is not counted
        for way, more in ways.items():
            found = [answer(original, prompt, **options, **more) for prompt in prompts]
            seen[way] = found
            if run:
                taken[way].append(
                    sum(each.seconds for each in found) / sum(each.tokens for each in found)
                )
    alone = [each.ids for each in seen["", 0]]
    rows = []
    for (name, count), found in seen.items():
        drafted = sum(each.drafted for each in found)
        row = {
            "draft": Path(name).name,
            "draft_tokens": count,
            "same_tokens": sum(each.ids == ids for each, ids in zip(found, alone, strict=True)),
            "accepted": sum(each.accepted for each in found) / drafted if drafted else None,
            "tokens_a_pass": sum(e.tokens for e in found) / sum(e.passes for e in found),
            "seconds_a_token": taken[name, count],
            "speedup": median(taken["", 0]) / median(taken[name, count]),
            "depth": drafts[name].source.num_layers if name else original.source.num_layers,
        }
        rows.append(row)
        accepted = "" if row["accepted"] is None else f"{row['accepted']:.0%} accepted, "
        print(
            f"depth {row['depth']}, {count} drafted: {accepted}"
            f"{row['tokens_a_pass']:.2f} tokens per pass, {row['speedup']:.2f}x,"
            f" same tokens: {row['same_tokens']} of {len(prompts)} prompts",
            flush=True,
        )
    machine = torch.cuda.get_device_name() if default_device() == "cuda" else platform.machine()
    held = {"on": machine, "dtype": dtype_name(original.model.dtype), "prompts": len(prompts)}
    arguments.json.write_text(json.dumps(held | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
