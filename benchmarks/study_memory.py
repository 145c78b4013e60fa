"""Memory of a study of a model that is larger than memory.

The files of a synthetic checkpoint of Llama-3-70B's width are holes: they take no disk and read as
zeros, through the page cache as all files do. All its layers are run in order, in pairs and merged,
and once more with every layer's input kept, in a process whose anonymous resident memory is
sampled. Needs Linux.

    python benchmarks/study_memory.py [--layers 16] [--windows 4] [--json PATH]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from conversion import LLAMA_3_70B, peak_memory, write_model
from rows import machine, parser_of, report

STUDY = """
import sys, torch, truedepth as td
from truedepth.runtime.loading import load
from truedepth.depth_study.schedule import Runner, in_order
from truedepth.depth_study.transformations import Cell
source, windows = td.open_source(sys.argv[1]), int(sys.argv[2])
layers = source.num_layers
ids = torch.randint(source.config["vocab_size"], (windows, 64))
loaded = load(source, device="cpu", dtype=torch.bfloat16)
runner = Runner(loaded, ids)
cells = [Cell(name, 0, layers).schedule(layers) for name in ("2-parallel", "merge")]
list(runner.run([in_order(range(layers)), *cells]))
runner.inputs()
print(runner.evaluated)
"""


def main() -> None:
    """Study once; print and write what it took."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--windows", type=int, default=4, help="windows of 64 tokens")
    parser.add_argument("--directory", type=Path, help="for the checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        model = LLAMA_3_70B | {"num_hidden_layers": arguments.layers}
        size = write_model(Path(directory), model, sparse=True)
        start = time.perf_counter()
        command = [sys.executable, "-c", STUDY, directory, str(arguments.windows)]
        peak, printed = peak_memory(command)
    result = {
        "machine": machine(),
        "layers": arguments.layers,
        "tokens": 64 * arguments.windows,
        "size": size,
        "layers_evaluated": float(printed),
        "peak_anonymous_bytes": peak,
        "minutes": (time.perf_counter() - start) / 60,
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
