"""Plots: the frontier of a search, speed-ups, and what healing lowers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from truedepth.errors import TruedepthError
from truedepth.planning.candidates import FORMS
from truedepth.planning.result import Search
from truedepth.report.search import any_form
from truedepth.speed.benchmark import Benchmark
from truedepth.speed.timing import Row

TICKS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn, so that a run fails before its work rather than after.

    Raises:
        TruedepthError: The file's suffix is not one of `FORMATS`, or matplotlib is missing.
    """
    if path.suffix not in FORMATS:
        raise TruedepthError(f"The plot {path} must end in one of {', '.join(FORMATS)}.")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise TruedepthError("--plot needs matplotlib: pip install 'truedepth[report]'.") from None


def plot_frontier(found: Search, path: Path) -> None:
    """Draw measured losses with standard errors, and for all plans the sum of merges' losses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    points = [(point.plan.all_reduces, point) for point in found.frontier]
    for form in FORMS:
        sums = [(stages, p.by_form[form]) for stages, p in points if form in p.by_form]
        if sums:
            axes.plot(*zip(*sums, strict=True), ".:", label=f"sum of merges as they are, {form}")
    label = f"sum of merges, {any_form(found)}"
    sums = [(stages, point.predicted) for stages, point in points]
    axes.plot(*zip(*sums, strict=True), ".:", color="black", label=label)
    known = [(p.plan.all_reduces, p.measured) for p in found.frontier if p.measured]
    axes.errorbar(
        [stages for stages, _ in known],
        [loss.excess for _, loss in known],
        [loss.stderr or 0.0 for _, loss in known],
        fmt="o",
        color="black",
        capsize=3,
        label="measured" + (", refitted" if found.calibrated else ", not refitted"),
    )
    axes.plot(
        found.plan.all_reduces, found.check.excess, "D", color="tab:red", label="held-out text"
    )
    if found.max_loss is not None:
        axes.axhline(found.max_loss, color="tab:gray", linestyle="--", linewidth=1, label="limit")
    axes.set(
        title=f"{found.plan.model}: {found.plan.num_layers} layers",
        xlabel="all-reduces per token",
        ylabel="excess loss, nats per token",
    )
    axes.set_yscale("symlog", linthresh=TICKS[2])
    lowest, highest = axes.get_ylim()
    ticks = [tick for tick in TICKS if lowest <= tick <= highest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)


def plot_benchmark(found: Benchmark, path: Path) -> None:
    """Draw speed-up against length, one line for each task and batch size.

    Error bars reach from the smallest to the largest speed-up of neighbouring runs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Row]] = {}
    for row in found.rows:
        lines.setdefault(f"{row.case.task.value}, batch {row.case.batch}", []).append(row)
    for label, rows in lines.items():
        middle = [row.speedup or 0.0 for row in rows]
        spread = list(zip(*(row.spread or (0.0, 0.0) for row in rows), strict=True))
        lengths = [row.case.length for row in rows]
        axes.errorbar(lengths, middle, spread, fmt="o-", capsize=3, label=label)
    axes.axhline(1, color="tab:gray", linewidth=1)
    setup = found.setup
    ranks = f", {setup.ranks} ranks" if setup.ranks > 1 else ""
    axes.set(
        title=f"{setup.model} against {setup.against}\n{found.engine} on {setup.device}{ranks}",
        xlabel="tokens",
        ylabel="speed-up",
    )
    axes.set_xscale("log", base=2)
    lengths = sorted({row.case.length for row in found.rows})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_healing(
    curves: Mapping[str, tuple[int, Sequence[Mapping[str, float]]]], path: Path
) -> None:
    """Draw KL and excess loss, with standard errors, of every validation against tokens.

    Args:
        curves: By the name of a run, its tokens per step and `Healed.curve`.
        path: The picture, with a suffix of `FORMATS`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, (step_tokens, curve)) in enumerate(curves.items()):
        tokens = [step_tokens * row["step"] for row in curve]
        excess, errors = ([row[key] for row in curve] for key in ("excess", "stderr"))
        color = f"C{number}"
        axes.plot(tokens, [row["kl"] for row in curve], "o-", color=color, label=name or None)
        axes.errorbar(tokens, excess, errors, fmt="o:", mfc="white", capsize=3, color=color)
    shade = "gray" if len(curves) > 1 else "C0"
    axes.plot([], [], "o-", color=shade, label="KL")
    axes.plot([], [], "o:", mfc="white", color=shade, label="excess loss")
    axes.set(xlabel="tokens trained on", ylabel="nats per token, held-out windows")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper") if len(curves) > 1 else axes.legend()
    figure.savefig(path, dpi=150)
