"""What `export` prints, for a terminal of 80 columns."""

from __future__ import annotations

from rich.filesize import decimal

from truedepth.engines.gguf.export import Export
from truedepth.report.tables import print_rows


def print_export(done: Export) -> None:
    """Print what was written, and how to run it in llama.cpp."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.tensors.items())
    print_rows(
        [
            ("written", f"{done.path} ({decimal(done.size)})"),
            ("type", f"{done.type} (tensors: {kinds})"),
            ("run with", f"llama-cli -m {done.path}, or truedepth generate {done.path} PROMPT"),
        ]
    )
