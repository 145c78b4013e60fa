"""Time and layer evaluations of a stride-1 study of the default model.

    python benchmarks/study.py --text FILE [--windows 8] [--window 256] [--json PATH]

The target is 2,048 tokens (the default here) in under 45 minutes on 2 cores, and at most 60 % of
the layer evaluations that running every cell by itself would take. The study's directory is
temporary, so no earlier measurement is reused.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from rows import machine, parser_of, report
from truedepth.depth_study.run import study


def main() -> None:
    """Run the study once; print and write what it took."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", type=Path, help="default: Python's own documentation")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--stride", type=int, default=1)
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
        "machine": machine(),
        "settings": found.settings,
        "tokens": arguments.window * arguments.windows,
        "minutes": (time.perf_counter() - start) / 60,
        "layers_evaluated": found.evaluated,
        "layers_naive": found.naive,
        "share": found.evaluated / found.naive,
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
