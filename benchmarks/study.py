"""Time and layer evaluations of a stride-1 study of the default model.

    python benchmarks/study.py --text FILE [--windows 8] [--window 256] [--json PATH]

The target: 2,048 tokens (the default here) in under 45 minutes on 2 cores, and at most 60 % of the
layer evaluations that running every cell by itself would take. The directory is thrown away, so
nothing measured before is reused.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from truedepth.depth_study.run import study


def main() -> None:
    """Run the study once; print and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", type=Path, help="by default Python's own documentation")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        found = study(
            arguments.model,
            Path(directory) / "study",
            text=arguments.text,
            window=arguments.window,
            windows=arguments.windows,
            stride=arguments.stride,
        )
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "settings": found.settings,
        "tokens": arguments.window * arguments.windows,
        "minutes": (time.perf_counter() - start) / 60,
        "layers_evaluated": found.evaluated,
        "layers_naive": found.naive,
        "share": found.evaluated / found.naive,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
