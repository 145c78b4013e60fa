"""Speed of a training step, plain and with compiled layers.

    python benchmarks/healing_step.py CKPT [--model default] [--windows 4] [--runs 5] [--json PATH]

A pass is forward and backward over windows of 512 random tokens: the original's predictions, the
student's loss and its gradients. Plain and compiled passes take turns in one process. Compiling is
not counted; its seconds are those that the first compiled pass takes longer.
"""

from __future__ import annotations

import time
from statistics import median

import torch

import truedepth as td
from rows import machine, parser_of, report
from truedepth.healing.distillation import Distillation
from truedepth.healing.front import share_front
from truedepth.healing.options import Objective, Train
from truedepth.healing.student import compile_layers, is_trained, original_beside, student_of
from truedepth.healing.teacher import Original
from truedepth.runtime.device import default_device, fast_dtype
from truedepth.sources.source import Source
from truedepth.widening.layout import Layout

LENGTH = 512


def distillation(source: Source, original: Source, compiled: bool, device: str) -> Distillation:
    """A student and its teacher, as `heal` makes them."""
    layout, dtype = Layout.of(source), fast_dtype(original, torch.device(device))
    trained = is_trained(original.family, layout, Train.paired)
    student = student_of(source, trained, dtype).to(device)
    beside = original_beside(student, original, layout, dtype).to(device)
    share_front(student, beside, original.family, layout)
    if compiled:
        compile_layers(student, original.family)
        compile_layers(beside, original.family)
    teacher = Original(beside)
    return Distillation(student.train(), teacher, teacher, layout, Objective())


def main() -> None:
    """Time passes; print and write their seconds."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--model", default="default")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    device = default_device()
    ids = torch.randint(0, 1000, (arguments.windows, LENGTH), device=device)
    models = {
        name: distillation(
            td.open_source(arguments.checkpoint), td.open_source(arguments.model), quick, device
        )
        for name, quick in (("plain", False), ("compiled", True))
    }

    def timed(model: Distillation) -> float:
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(ids, torch.arange(arguments.windows))
        loss.backward()
        loss.item()  # waits for a GPU
        return time.perf_counter() - start

    first = {name: timed(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.runs):
        for name, model in models.items():
            seconds[name].append(timed(model))
    medians = {name: median(each) for name, each in seconds.items()}
    result = {
        "on": torch.cuda.get_device_name() if device == "cuda" else machine(),
        "seconds": seconds,
        "tokens_per_second": {name: ids.numel() / each for name, each in medians.items()},
        "speedup": median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "compiling": first["compiled"] - medians["compiled"],
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
