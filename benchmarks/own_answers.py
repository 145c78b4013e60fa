"""How far checkpoints are from the original on what the original itself says.

    python benchmarks/own_answers.py CKPT [CKPT…] --prompts FILE --json PATH
        [--model default] [--max-new-tokens 128] [--seed 0]

The original answers prompts by sampling, through its chat template. Printed and written are the KL
from the original of every checkpoint over the tokens of these answers, and how it differs from the
first checkpoint's, with standard errors over answers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import truedepth as td
from rows import machine, parser_of, report
from truedepth.evaluation.scores import stderr
from truedepth.runtime.generation import continuations
from truedepth.runtime.loading import Loaded
from truedepth.runtime.prompt import prompt_ids, read_prompts

BATCH = 32  # prompts that are answered at once


@torch.inference_mode()
def log_probabilities(loaded: Loaded, prompt: list[int], answer: list[int]) -> Tensor:
    """What a model predicts at every token of an answer, `[tokens, vocabulary]`."""
    ids = torch.tensor([prompt + answer[:-1]], device=loaded.model.device)
    logits: Tensor = loaded.model(ids, use_cache=False, logits_to_keep=len(answer)).logits
    return logits[0].log_softmax(-1)


def divergences(
    model: Loaded, original: Loaded, prompts: list[list[int]], answers: list[list[int]]
) -> list[float]:
    """KL(original ‖ model) of every answer, summed over its tokens."""
    found = []
    for each in zip(prompts, answers, strict=True):
        reference, own = (log_probabilities(loaded, *each) for loaded in (original, model))
        found.append((reference.exp() * (reference - own)).sum().item())
    return found


def main() -> None:
    """Let the original answer, and measure one checkpoint after another."""
    parser = parser_of(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    original = td.load(arguments.model, dtype=torch.float32)
    prompts = [prompt_ids(original.source, each) for each in read_prompts(arguments.prompts)]
    torch.manual_seed(arguments.seed)
    answers = continuations(original, prompts, arguments.max_new_tokens, BATCH, temperature=1.0)
    tokens = sum(map(len, answers))
    rows = {}
    first: list[float] = []
    for path in arguments.checkpoints:
        sums = divergences(td.load(path, dtype=torch.float32), original, prompts, answers)
        first = first or sums
        apart = [len(sums) * (one - other) / tokens for one, other in zip(sums, first, strict=True)]
        rows[str(path)] = {
            "kl": sum(sums) / tokens,
            "difference": sum(apart) / len(apart),
            "difference_stderr": stderr(apart),
        }
    settings = {"answers": len(answers), "tokens": tokens, "machine": machine()}
    report({**settings, "checkpoints": rows}, arguments.json)


if __name__ == "__main__":
    main()
