"""Memory of healing: the original as a second model, sharing frozen tensors, or kept on disk.

    python benchmarks/healing_memory.py [--model default] [--layers 14-27] --train-text FILE
        [--runs 3] [--json PATH]

Every run is a separate process that takes two steps (the optimizer's moments exist from the first
on) of two windows of 512 tokens, one window per pass. The peak is that of the GPU's allocated
memory if there is a GPU, else of the process's anonymous resident memory. Needs Linux.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

import truedepth as td
from conversion import peak_memory
from rows import parser_of, report
from truedepth.plan.plan import Plan
from truedepth.plan.spans import parse_span

WAYS = ("a second model", "shared", "kept on disk")

HEAL = """
import sys, json, torch, truedepth as td
from truedepth.healing import run
from truedepth.healing.options import Healing, TextPart
checkpoint, out, teacher, text, way = sys.argv[1:]
if way == "a second model":
    beside = run.original_beside
    run.original_beside = lambda *given, shared: beside(*given, shared=False)
options = Healing(
    text=(TextPart(text),), tokens=2 * 2 * 512, batch_size=2, micro_batch_size=1, validation=2,
    keep_predictions=64 * (way == "kept on disk"),
)
td.heal(checkpoint, out, teacher=teacher, healing=options)
if torch.cuda.is_available():
    print(json.dumps(torch.cuda.max_memory_allocated()))
"""


def main() -> None:
    """Heal in each of the three ways, interleaved; print and write the peaks."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("--model", default="default")
    parser.add_argument("--layers", default="14-27")
    parser.add_argument("--train-text", required=True)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "converted"
        source = td.open_source(arguments.model)
        plan = Plan.span(source.num_layers, *parse_span(arguments.layers))
        td.convert(source, checkpoint, plan)
        for run in range(arguments.runs):
            for way in WAYS:
                out = Path(directory) / f"{way}-{run}"
                command = [sys.executable, "-c", HEAL, str(checkpoint), str(out)]
                command += [arguments.model, arguments.train_text, way]
                peak, printed = peak_memory(command)
                if torch.cuda.is_available():
                    peak = json.loads(printed.splitlines()[-1])
                peaks[way].append(peak)
    gpu = torch.cuda.is_available()
    result = {
        "on": torch.cuda.get_device_name() if gpu else platform.machine(),
        "what": "allocated on the GPU" if gpu else "anonymous resident memory",
        "peak_bytes": peaks,
        "median_bytes": {way: median(values) for way, values in peaks.items()},
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
