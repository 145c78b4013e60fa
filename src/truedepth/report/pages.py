"""What the commands print, for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.columns import Columns
from rich.filesize import decimal
from rich.panel import Panel

from truedepth.checkpoint.records import Loss
from truedepth.conversion import Conversion
from truedepth.demo import Demo
from truedepth.depth_study.run import Study
from truedepth.engines.gguf.export import Export
from truedepth.evaluation.loss import perplexity_of
from truedepth.healing.run import Healed
from truedepth.inspection import Info
from truedepth.plan.plan import Plan
from truedepth.planning.search import Search
from truedepth.report.tables import console, excess_text, print_rows
from truedepth.speed.timing import Timing
from truedepth.tensors import dtype_name


def print_info(info: Info, dtype: torch.dtype | None) -> None:
    """What a model is and what a plan would save; sizes in `dtype` or, by default, in bfloat16."""
    dtype = dtype or torch.bfloat16
    name = dtype_name(dtype)
    weights, cache = info.parameters * dtype.itemsize, info.kv_elements_per_token * dtype.itemsize
    plan = info.plan
    rows = [
        ("model", info.name),
        ("found", info.origin + (f" ({info.quantization})" if info.quantization else "")),
        ("family", info.family),
        ("layers", str(plan.num_layers)),
        (
            "a layer",
            f"hidden size {info.hidden_size}, {info.heads} heads, {info.kv_heads} KV heads,"
            f" head_dim {info.head_dim}, FFN {info.ffn}",
        ),
        ("parameters", f"{info.parameters / 1e6:,.1f} M, {decimal(weights)} in {name}"),
        ("KV cache", f"{decimal(cache)} a token in {name}"),
    ]
    if info.converted:
        print_rows([*rows, *_plan_rows(plan, info.executed_plan), *_side_by_side_rows(info)])
        return
    paired = f"all layers, 0 to {plan.num_layers - 1}, in groups of any size, exactly"
    print_rows([*rows, ("can be paired", paired), *_side_by_side_rows(info)])
    print("\nWhat pairing would save (weights and KV cache stay the same):\n")
    full = plan.all_reduces
    print_rows(
        [
            (
                str(saving.pairs),
                str(saving.paired_layers),
                str(saving.effective_depth),
                str(saving.all_reduces_per_token),
                f"{saving.all_reduces_per_token / full - 1:+.0%}" if saving.pairs else "",
            )
            for saving in info.savings
        ],
        header=("pairs", "Δ", "effective depth", "all-reduces a token*", ""),
    )
    print("\n* under tensor parallelism; none on one device")


def print_search(found: Search, out: Path) -> None:
    """The plan, what it costs, and the frontier."""
    print_rows(
        [
            ("model", found.source),
            *_plan_rows(found.plan),
            *_search_rows(found),
            ("written", str(out)),
        ]
    )
    print("\nThe best plans found, by effective depth; nats a token:\n")
    print_rows(
        [
            (
                str(point.plan.effective_depth),
                f"{point.predicted:.3f}",
                _excess(point.measured) if point.measured else "-",
                f"{point.measured.kl:.3f}" if point.measured else "-",
                _groups(point.plan),
            )
            for point in found.frontier
        ],
        header=("depth", "groups' sum", "excess loss", "KL", "layers in pairs"),
        words=[4],
    )


def _search_rows(found: Search) -> list[tuple[str, str]]:
    limit = found.max_loss
    held = "" if limit is None else f"; at most {limit:.4f} was asked for"
    spent = (
        f"{found.plans_measured} plans measured, {found.forward_passes:,.0f} forward passes of a"
        f" window, {found.seconds / 60:.1f} min" + (", time was up" if found.stopped else "")
    )
    return [
        ("excess loss", f"{_excess(found.loss)} nats a token on {found.loss.tokens:,} tokens"),
        (
            "held-out check",
            f"{_excess(found.check)} nats a token on {found.check.tokens:,} others{held}",
        ),
        ("search", spent),
    ]


def _excess(loss: Loss) -> str:
    return f"{loss.excess:.4f}" + ("" if loss.stderr is None else f" ± {loss.stderr:.4f}")


def _groups(plan: Plan) -> str:
    """Spans of adjacent wide groups: 12-19 24-27; of three layers each: 12-17 by 3."""
    spans: list[list[int]] = []  # first layer, last layer, layers a group
    for group in plan.groups:
        if len(group) == 1:
            continue
        if spans and (spans[-1][1] + 1, spans[-1][2]) == (group[0], len(group)):
            spans[-1][1] = group[-1]
        else:
            spans.append([group[0], group[-1], len(group)])
    return ", ".join(
        f"{first}-{last}" + (f" by {size}" if size > 2 else "") for first, last, size in spans
    )


def print_conversion(done: Conversion, found: Search | None = None) -> None:
    """What was written, and how its plan was found."""
    print_rows(
        [
            ("model", f"{done.source} ({done.origin})"),
            *([("dequantized", f"once, from {done.quantization}")] if done.quantization else []),
            *_plan_rows(done.plan, done.executed_plan),
            *([("search", _search_rows(found)[-1][1])] if found else []),
            *_calibration_rows(done),
            ("written", f"{done.path} ({decimal(done.size)} of weights)"),
        ]
    )


def print_export(done: Export) -> None:
    """What was written, and how llama.cpp runs it."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.tensors.items())
    print_rows(
        [
            ("written", f"{done.path} ({decimal(done.size)})"),
            ("type", f"{done.type} (tensors: {kinds})"),
            ("run it", f"llama-cli -m {done.path}, or truedepth generate {done.path} PROMPT"),
        ]
    )


def _calibration_rows(done: Conversion) -> list[tuple[str, str]]:
    if done.calibration is None:
        return []
    rows = [("calibrated", f"on {done.calibration}")]
    if loss := done.calibration.check:
        rows.append(
            ("held-out check", f"{_excess(loss)} nats a token on {loss.tokens:,} other tokens")
        )
    return rows


def print_healing(done: Healed) -> None:
    """What was trained on, and how far the checkpoint is from its original before and after."""
    repeats = done.tokens / done.text_tokens
    trained = f"{done.tokens:,} tokens" + (
        f": the text has {done.text_tokens:,}, each was read {repeats:.1f} times"
        if repeats > 1.01
        else ""
    )
    before, after = done.record.validation.before, done.record.validation.after
    print_rows(
        [
            ("checkpoint", done.source),
            ("original", done.original),
            ("text", ", ".join(f"{name} ({n:,})" for name, n in done.record.text.items())),
            ("trained on", trained),
            ("time", f"{done.seconds / 60:.1f} min"),
            ("written", str(done.path)),
        ]
    )
    print("\nOn windows that were not trained on, nats a token:\n")
    print_rows(
        [
            (name, *(f"{row['excess']:.4f} ± {row['stderr']:.4f}", f"{row['kl']:.4f}"))
            for name, row in (("before", before), ("after", after))
        ],
        header=("", "excess loss", "KL"),
    )
    if not after["loss"] < before["loss"]:
        print(
            "\nTraining did not help: what it minimises is no lower than before. Keep the"
            " checkpoint\nthat it began from, or try a smaller --learning-rate or more --tokens."
        )


def print_demo(demo: Demo) -> None:
    """One page: plan, size, loss, speed, and the same prompt answered by both."""
    measured, done, plan = demo.perplexity, demo.conversion, demo.conversion.plan
    print_rows(
        [
            ("model", f"{done.source} ({done.origin})"),
            *_plan_rows(plan, done.executed_plan),
            *_calibration_rows(done),
            ("weights", decimal(done.size) + (f", kept in {done.path}" if demo.kept else "")),
        ]
    )
    print()
    assert demo.speed.base is not None
    print_rows(
        [
            ("effective depth", str(plan.num_layers), str(plan.effective_depth)),
            (
                "all-reduces a token, tensor parallel",
                str(plan.unpaired.all_reduces),
                str(done.executed_plan.all_reduces),
            ),
            ("perplexity", f"{measured.against_perplexity:.2f}", f"{measured.perplexity:.2f}"),
            ("excess loss, nats a token", "", excess_text(measured)),
            ("KL from the original, nats a token", "", f"{measured.kl:.4f}"),
            ("top-1 agreement", "", f"{measured.top1_agreement:.1%}"),
            (
                f"decode on this {demo.device}, tokens/s",
                _rate(demo.speed.base),
                _rate(demo.speed.model),
            ),
        ],
        header=("", "original", "layer-parallel"),
    )
    print(f"\nPerplexity on {measured.tokens} tokens of {measured.text}.")
    print("One device has no all-reduces to save: the gain is under tensor parallelism.")
    print(f"\n{demo.prompt}\n")
    width = min(console().width, 100) // 2 - 1
    console().print(
        Columns(
            [
                Panel(demo.answer_before or "(nothing)", title="original", width=width),
                Panel(demo.answer_after or "(nothing)", title="layer-parallel", width=width),
            ]
        )
    )


def _rate(timing: Timing) -> str:
    """Of single tokens."""
    fastest, slowest = 1 / min(timing.seconds), 1 / max(timing.seconds)
    return f"{1 / timing.median:.1f} ({slowest:.1f}-{fastest:.1f})"


def print_study(study: Study, written: Sequence[Path]) -> None:
    """The paper's three questions, and where the report is."""
    print_rows(
        [
            ("model", f"{study.settings['model']} ({study.settings['origin']})"),
            ("layers", str(study.num_layers)),
            ("perplexity", f"{perplexity_of(study.nll):.2f} on {study.settings['text']}"),
            ("evaluated", f"{study.evaluated:,.0f} layers; span by span {study.naive:,.0f}"),
        ]
    )
    medians = study.medians
    if lengths := sorted({length for row in medians.values() for length in row}):
        print("\nMedian excess loss of all spans of so many layers, nats a token:\n")
        print_rows(
            [
                (name, *(f"{row[n]:+.2f}" if n in row else "-" for n in lengths))
                for name, row in medians.items()
            ],
            header=("transformation", *map(str, lengths)),
        )
    if study.sweep:
        print("\nBest spans of consecutive pairs:\n")
        print_rows(
            [
                (
                    str(row.paired_layers),
                    str(row.effective_depth),
                    f"{row.best_last_layer - row.paired_layers + 1}-{row.best_last_layer}",
                    f"{perplexity_of(row.best_nll):.2f}",
                    f"{row.best_nll - study.nll:+.3f}",
                )
                for row in study.sweep
            ],
            header=("Δ", "effective depth", "layers", "perplexity", "nats a token"),
        )
    print("\nRank correlation of each measure with the loss of pairing:\n")
    print_rows(
        [
            (name, _correlation(found["pairs"]), _correlation(found["spans"]))
            for name, found in study.correlation.items()
        ],
        header=("measure", "neighbours", "spans of a length"),
    )
    print("\nWritten: " + ", ".join(map(str, written)))


def _side_by_side_rows(info: Info) -> list[tuple[str, str]]:
    """Which groups are no wide layers, and which engines run the model."""
    rows = []
    if info.side_by_side:
        begin = ", ".join(map(str, info.side_by_side[:4])) + (
            ", …" if len(info.side_by_side) > 4 else ""
        )
        which = f"those that begin with layer {begin}"
        if len(info.side_by_side) == info.plan.num_layers - 1:
            which = "all"
        said = f"{which}: {info.side_by_side_reason}" if info.side_by_side_reason else which
        rows = [("side by side", said), ("", "exact too, but they save no all-reduces")]
    engines = (name if not why else f"{name}: no, {why}" for name, why in info.engines.items())
    return [*rows, ("engines", "; ".join(engines))]


def _correlation(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _plan_rows(plan: Plan, executed: Plan | None = None) -> list[tuple[str, str]]:
    depths = f"{plan.num_layers} -> {plan.effective_depth} (Δ = {plan.paired_layers})"
    before, after = plan.unpaired.all_reduces, (executed or plan).all_reduces
    return [
        ("plan", str(plan)),
        ("effective depth", depths),
        ("all-reduces", f"{before} -> {after} a token under tensor parallelism"),
    ]
