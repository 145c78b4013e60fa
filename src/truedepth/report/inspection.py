"""What `info` prints, for a terminal of 80 columns."""

from __future__ import annotations

import torch
from rich.filesize import decimal

from truedepth.inspection import Info
from truedepth.report.tables import plan_rows, print_rows
from truedepth.tensors import dtype_name


def print_info(info: Info, dtype: torch.dtype | None) -> None:
    """Print what a model is and what plans would save; sizes for `dtype`, default bfloat16."""
    dtype = dtype or torch.bfloat16
    name = dtype_name(dtype)
    weights, cache = info.parameters * dtype.itemsize, info.kv_elements_per_token * dtype.itemsize
    plan = info.plan
    rows = [
        ("model", info.name),
        ("found", info.origin + (f" ({info.quantization})" if info.quantization else "")),
        (
            "family",
            info.family
            + (f", inside {info.inside}" if info.inside else "")
            + (", found by running a small random model" if info.traced else ""),
        ),
        ("layers", str(plan.num_layers)),
        (
            "each layer",
            f"hidden size {info.hidden_size}, {info.heads} heads, {info.kv_heads} KV heads,"
            f" head_dim {info.head_dim}, FFN {info.ffn}",
        ),
        ("parameters", f"{info.parameters / 1e6:,.1f} M, {decimal(weights)} in {name}"),
        ("KV cache", f"{decimal(cache)} per token in {name}"),
    ]
    if info.converted:
        print_rows([*rows, *plan_rows(plan, info.executed_plan), *_side_by_side_rows(info)])
        return
    paired = f"layers 0 to {plan.num_layers - 1}, in groups of any size (exact)"
    shared = "any neighbours, such as an FFN and the next attention, [F0 A1] (exact)"
    if info.stages_of_whole_layers:
        shared = "whole layers: [A0 F0], which loses nothing, or [A0 F0 A1 F1] (exact)"
    more = [("can share stages", shared)]
    if info.mixture:
        kept = "experts and routers stay as they are"
        more.append(("is refitted", f"attention, dense FFNs and shared experts; {kept}"))
    print_rows([*rows, ("can be paired", paired), *_side_by_side_rows(info, *more)])
    print("\nWhat plans would save (weights and KV cache keep their size):\n")
    full = plan.all_reduces
    print_rows(
        [
            (
                str(saving.pairs),
                "-" if saving.staggered is None else str(saving.staggered),
                str(saving.paired_layers),
                str(saving.effective_depth),
                str(saving.all_reduces_per_token),
                _change(saving.all_reduces_per_token, full),
            )
            for saving in info.savings
        ],
        header=("pairs", "or [Fk Ak+1]", "Δ", "effective depth", "all-reduces*", "change"),
        words=(),
    )
    print("\n* per token, with tensor parallelism; a single device needs none")


def _change(after: int, before: int) -> str:
    return f"{after / before - 1:+.0%}" if after != before else ""


def _side_by_side_rows(info: Info, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """Which groups cannot become wide layers, `more`, and which engines run the model."""
    rows: list[tuple[str, str]] = []
    if info.side_by_side:
        begin = ", ".join(map(str, info.side_by_side[:4])) + (
            ", …" if len(info.side_by_side) > 4 else ""
        )
        which = f"those that start at layer {begin}"
        if len(info.side_by_side) == info.plan.num_layers - 1:
            which = "all pairs"
        said = f"{which}: {info.side_by_side_reason}" if info.side_by_side_reason else which
        rows = [("side by side", said), ("", "also exact, but they save no all-reduces")]
    engines = (f"{name}: {why or 'yes'}" for name, why in info.engines.items())
    return [*rows, *more, ("engines", "; ".join(engines))]
