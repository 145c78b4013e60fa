"""Writes a study as study.json, as report.html that opens offline, and its figures as PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truedepth.depth_study.correlation import Matrix
from truedepth.depth_study.dependence import MEASURES
from truedepth.depth_study.result import Study
from truedepth.depth_study.transformations import TRANSFORMATIONS
from truedepth.evaluation.loss import perplexity_of
from truedepth.files.atomic import whole_file
from truedepth.plan.stages import Sublayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MOST_EXCESS = 3.0  # nats per token; end of the common colour scale


def write_study(study: Study, directory: Path, command: str) -> list[Path]:
    """Write the report of a study into a directory.

    PNG figures need matplotlib (the extra `report`); without it they are left out.

    Args:
        study: The study.
        directory: Output directory; existing files of the same names are replaced.
        command: The command that made the study, shown on the page.

    Returns:
        Paths of the files written.
    """
    data = study.to_dict() | {"command": command}
    texts = {
        directory / "study.json": json.dumps(_plain(data), indent=1) + "\n",
        directory / "report.html": report_html(data),
    }
    for path, text in texts.items():
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    written = list(texts)
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        return written
    return written + _figures(study, directory)


def report_html(data: dict[str, Any]) -> str:
    """Make the HTML page of a study's data: one file that requests nothing from elsewhere."""
    template = files("truedepth.report").joinpath("study.html").read_text(encoding="utf-8")
    descriptions = {name: each.description for name, each in TRANSFORMATIONS.items()}
    data = data | {"descriptions": descriptions | MEASURES}
    text = json.dumps(_plain(data)).replace(
        "<", "\\u003c"
    )  # so that no text can end the script element
    return template.replace("{{DATA}}", text)


def _plain(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by None: they were not measured."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(study: Study, directory: Path) -> list[Path]:
    figures = {"spans": _spans_figure(study), "sweep": _sweep_figure(study)}
    figures["dependence"] = _dependence_figure(study)
    paths = [directory / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
    return paths


def _spans_figure(study: Study) -> Figure:
    from matplotlib.figure import Figure

    known = [v for m in study.transformed.values() for row in m for v in row if v is not None]
    most = max(0.1, min(MOST_EXCESS, max(known) - study.nll))
    names = list(study.transformed)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        image = _heat_map(axis, name, study.transformed[name], study.nll, (0, most))
    figure.colorbar(image, ax=axes, label="excess loss, nats per token (original: 0)", shrink=0.6)
    return figure


def _sweep_figure(study: Study) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    sweep = [row for row in study.sweep if len(row.nll) > 1]
    for index, row in enumerate(sweep):
        shade = colormaps["viridis_r"](0.1 + 0.85 * index / len(sweep))
        perplexities = [_drawn(nll, study) for nll in row.nll]
        axis.plot(row.last_layers, perplexities, color=shade, label=f"{row.paired_layers}")
        axis.plot(row.best_last_layer, _drawn(row.best_nll, study), "o", color="#c2255c")
    axis.axhline(_drawn(study.nll, study), color="grey", linestyle=":")
    axis.set(xlabel="last layer of the paired span", ylabel="perplexity", yscale="log")
    if sweep:
        figure.legend(title="Δ", loc="outside right upper", fontsize="small")
    return figure


def _drawn(nll: float, study: Study) -> float:
    """The perplexity to draw: at most that at which the plot's axis ends."""
    return perplexity_of(min(nll, study.nll + MOST_EXCESS))


def _dependence_figure(study: Study) -> Figure:
    from matplotlib.figure import Figure

    measured = {"layer": study.dependence, "sub-layer": study.sublayer_dependence}
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    axes = figure.subplots(len(measured), len(study.dependence))
    for row, (unit, matrices) in zip(axes, measured.items(), strict=True):
        for axis, (name, matrix) in zip(row, matrices.items(), strict=True):
            image = _heat_map(axis, f"{name} of {unit}s", matrix)
            axis.set(xlabel=f"later {unit}", ylabel=f"earlier {unit}")
            if unit == "sub-layer":
                places = range(0, len(matrix), 10)
                named = [str(Sublayer.at(place)) for place in places]
                axis.set_xticks(places, named)
                axis.set_yticks(places, named)
            figure.colorbar(image, ax=axis)
    return figure


def _heat_map(
    axis: Axes,
    name: str,
    matrix: Matrix,
    base: float = 0.0,
    limits: Sequence[float | None] = (None, None),
) -> AxesImage:
    values = [[math.nan if v is None else v - base for v in row] for row in matrix]
    axis.set(title=name, xlabel="last layer", ylabel="first layer")
    return axis.imshow(values, cmap="viridis_r", vmin=limits[0], vmax=limits[1])
