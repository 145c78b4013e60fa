"""What calibration repairs, against the number of tokens and the share of the model's own text.

    python benchmarks/calibration.py --calibration FILE [--calibration FILE…] --text FILE
        [--text FILE…] [--layers 14-27] [--tokens 16384,65536] [--own-text 0,0.5] --json PATH

Rows that are already in the JSON file are not measured again, so the same command resumes.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

import truedepth as td
from rows import Rows, losses, parser_of
from truedepth.plan.plan import Plan
from truedepth.plan.spans import parse_span
from truedepth.runtime.device import fast_dtype


def main() -> None:
    """Measure row after row; the first row is the conversion without calibration."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--layers", default="14-27")
    parser.add_argument("--plan", type=Path, help="instead of --layers")
    parser.add_argument("--tokens", default="16384,65536")
    parser.add_argument("--own-text", default="0,0.5")
    arguments = parser.parse_args()
    source = td.open_source(arguments.model)
    if arguments.plan is not None:
        plan = Plan.from_yaml(arguments.plan)
    else:
        plan = Plan.span(source.num_layers, *parse_span(arguments.layers))
    dtype = fast_dtype(source, torch.device("cpu"))
    rows = Rows(arguments.json)
    original = td.load(source, dtype=dtype)
    settings: list[td.Calibration | None] = [None]
    for share, tokens in itertools.product(
        map(float, arguments.own_text.split(",")), map(int, arguments.tokens.split(","))
    ):
        settings.append(td.Calibration(text=arguments.calibration, tokens=tokens, own_text=share))
    for calibration in settings:
        key = f"{plan}, " + (
            f"{calibration.tokens} tokens, own text {calibration.own_text:g}"
            if calibration
            else "raw"
        )
        if key in rows:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            done = td.convert(source, out, plan, calibration=calibration)
            seconds = time.perf_counter() - start
            check = done.calibration.check if done.calibration else None
            lost = losses(td.load(out, dtype=dtype), original, arguments.text)
        rows[key] = {
            "plan": plan.to_dict(),
            "dtype": str(dtype),
            "check": asdict(check) if check else None,
            "seconds": seconds,
            "losses": lost,
        }
        rows.show(key)


if __name__ == "__main__":
    main()
