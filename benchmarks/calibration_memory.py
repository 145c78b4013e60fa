"""Memory of calibrating one pair of layers of Llama-2-7B's width.

Writes a synthetic checkpoint of three such layers, then refits the pair (1, 2) on random tokens in
a separate process and samples its anonymous resident memory. Weights are mapped from files, states
are in memory; the target is 24 GB for everything at 64 k tokens. Needs 4 GB of disk, Linux, and
hours on 2 cores.

    python benchmarks/calibration_memory.py [--tokens 65536] [--activation-dtype bfloat16]
        [--json PATH]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from conversion import LLAMA_2_7B, peak_memory, write_model
from rows import machine, parser_of, report

LAYERS = 3

CALIBRATE = """
import sys, torch, truedepth as td
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.trajectories import layer_stack, walk_through
from truedepth.plan.stages import Sublayer, group_segment
from truedepth.widening.layout import Layout
tokens, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
source = td.open_source(sys.argv[1])
plan = td.Plan(source.num_layers, [[1, 2]])
ids = torch.randint(source.config["vocab_size"], (tokens // 512, 512))
options = td.Calibration(activation_dtype=dtype)
stack = layer_stack(source, options)
walk = walk_through(stack, Layout(source, plan), ids, ids[:0], options)
for kind in ("attention", "ffn"):
    walk.advance(((Sublayer(0, kind),),))
Calibrator(walk).refit(group_segment((1, 2)))
"""


def main() -> None:
    """Calibrate once; print and write what it took."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--activation-dtype", default="bfloat16")
    parser.add_argument("--directory", type=Path, help="for the checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        write_model(Path(directory), LLAMA_2_7B | {"num_hidden_layers": LAYERS})
        start = time.perf_counter()
        options = [str(arguments.tokens), arguments.activation_dtype]
        peak, _ = peak_memory([sys.executable, "-c", CALIBRATE, directory, *options])
    result = {
        "machine": machine(),
        "tokens": arguments.tokens,
        "activation_dtype": arguments.activation_dtype,
        "peak_anonymous_bytes": peak,
        "minutes": (time.perf_counter() - start) / 60,
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
