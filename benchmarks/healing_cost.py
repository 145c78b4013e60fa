"""What healing costs: the arithmetic and the memory of a training step, counted without weights.

    python benchmarks/healing_cost.py --json PATH [--shapes SmolLM2-135M,Llama-3.2-1B,…]
        [--all-reduces 77,67,50] [--length 512]

A forward and backward pass of `heal`'s own loss, with the original's predictions, runs on tensors
without values, and torch counts the multiplications and additions of matrix products and attention.
Plans are staggered and leave so many per cent of the original's all-reduces: 46, 40 and 30 of 60.
What is trained is what shares a stage. Memory is that of weights (frozen ones in bfloat16, trained
ones in float32, the original's in bfloat16 where it does not share them), gradients and AdamW's
moments; activations come on top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from one_device import SHAPES, build, even_numbers, original_config
from rows import Rows, parser_of
from stages import staggered
from truedepth.families.registration import register
from truedepth.healing.distillation import Distillation
from truedepth.healing.front import share_front
from truedepth.healing.options import Objective, Train
from truedepth.healing.student import is_trained
from truedepth.healing.teacher import Original
from truedepth.plan.plan import Plan
from truedepth.sources.source import Source
from truedepth.widening.layout import Layout


def layout_of(shape: dict[str, Any], plan: Plan) -> Layout:
    """The layout of a model that has a config and no tensors."""
    config = original_config(shape)
    nothing: Any = dict
    return Layout(Source("shape", "config", Path("shape"), config, dict, nothing, nothing), plan)


def cost(shape: dict[str, Any], plan: Plan, length: int) -> dict[str, float]:
    """FLOPs per token of the original's forward pass and of a training step, and bytes held."""
    original, student = (build(shape, each, False, "cpu") for each in (plan.unpaired, plan))
    layout = layout_of(shape, plan)
    trained = is_trained(layout.source.family, layout, Train.paired)
    held = 2 * sum(each.numel() for each in original.parameters())
    theirs = dict(original.named_parameters())
    for name, parameter in list(student.named_parameters()):
        parameter.requires_grad_(trained(name))
        if trained(name):
            held += 16 * parameter.numel()  # beside the original's, which is not shared
        else:  # the staggered plan keeps every layer in its place
            module, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(module), leaf, theirs[name])
            theirs[name].requires_grad_(False)
    teacher = Original(original)
    model = Distillation(student, teacher, teacher, layout, Objective())
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        original(ids, use_cache=False)
    share_front(student, original, layout.source.family, layout)
    with FlopCounterMode(display=False) as step:
        model(ids, torch.zeros(1, dtype=torch.long)).backward()
    return {
        "forward": forward.get_total_flops() / length,
        "step": step.get_total_flops() / length,
        "bytes": held,
        "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in student.parameters()),
    }


def main() -> None:
    """Count, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", default=",".join(name for name in SHAPES if name != "tiny"))
    parser.add_argument("--all-reduces", default="77,67,50", help="per cent of the original's")
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    percents = [int(word) for word in arguments.all_reduces.split(",")]
    register()
    rows = Rows(arguments.json)
    for shape_name in arguments.shapes.split(","):
        shape = SHAPES[shape_name]
        layers = shape["num_hidden_layers"]
        for number in even_numbers(layers, percents):
            with FakeTensorMode():
                found = cost(shape, staggered(layers, number), arguments.length)
            rows[title := f"{shape_name}, staggered, {number} of {2 * layers}"] = found
            print(
                f"{title:40} step {found['step'] / 1e9:7.2f} GFLOP per token,"
                f" {found['step'] / found['forward']:.2f} forward passes of the original;"
                f" {found['bytes'] / 1e9:6.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
