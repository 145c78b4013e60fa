"""The commands that choose a plan and apply it: `plan` and `convert`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from truedepth.cli.options import (
    AllowPickle,
    Device,
    DType,
    Fast,
    Force,
    JsonPath,
    Model,
    RemoteCode,
    Seed,
    trusted,
    writable,
    write_json,
)
from truedepth.errors import TruedepthError
from truedepth.plan.plan import Plan
from truedepth.plan.spans import parse_span

if TYPE_CHECKING:
    from truedepth.calibration.options import Calibration
    from truedepth.planning.search import Search

Pairs = Annotated[int | None, typer.Option(help="Find the best plan of so many pairs.")]
Depth = Annotated[int | None, typer.Option(help="Find the best plan of this effective depth.")]
MaxLoss = Annotated[
    str | None,
    typer.Option(
        help="Find the shallowest plan that loses at most so many nats a token, or so much"
        " perplexity: 0.05, 5%."
    ),
]
MaxGroup = Annotated[int, typer.Option(help="Most layers a group, in a search.")]
Budget = Annotated[
    float | None, typer.Option(min=0, help="Minutes after which a search takes its best so far.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="To calibrate on: .txt or .jsonl file; repeat to mix several.",
        show_default="Python's own documentation",
    ),
]
Activations = Annotated[
    DType, typer.Option(help="Of the states that calibration keeps; auto is float32.")
]
Workspace = Annotated[
    Path | None, typer.Option(help="Directory for these states on disk.", show_default="in memory")
]
OwnText = Annotated[
    float | None,
    typer.Option(
        help="Share of these tokens that the model writes itself.",
        show_default="0.5 without --text, else 0",
    ),
]


def plan(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Plan file (YAML) to write.", callback=writable)
    ],
    pairs: Pairs = None,
    depth: Depth = None,
    max_loss: MaxLoss = None,
    max_group: MaxGroup = 2,
    calibrate: Annotated[
        bool, typer.Option(help="Refit the plans that are compared, as convert will.")
    ] = True,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Measure a plan of every effective depth.")
    ] = False,
    budget: Budget = None,
    text: Texts = None,
    tokens: Annotated[int | None, typer.Option(help="To refit on.", show_default="16384")] = None,
    own_text: OwnText = None,
    activation_dtype: Activations = DType.auto,
    workspace: Workspace = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Loss against effective depth, as PNG or SVG.", callback=writable),
    ] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Fast = DType.auto,
) -> None:
    """Find which layers of MODEL to pair: least loss at a depth, or least depth at a loss."""
    from truedepth.report.plots import check_plot, plot_frontier
    from truedepth.report.search import print_search

    if sum(goal is not None for goal in (pairs, depth, max_loss)) != 1:
        raise TruedepthError("Say how far to go with one of --max-loss, --depth, --pairs.")
    if plot is not None:
        check_plot(plot)
    limit = parse_loss(max_loss) if max_loss is not None else None

    from truedepth.planning.search import SEARCH_TOKENS, search

    found = search(
        trusted(model, allow_pickle, trust_remote_code),
        pairs=pairs,
        depth=depth,
        max_loss=limit,
        max_group=max_group,
        calibrate=calibrate,
        calibration=_calibration(
            text,
            tokens or SEARCH_TOKENS,
            own_text,
            device,
            activation_dtype,
            workspace,
            seed,
            dtype,
        ),
        frontier=frontier,
        budget=budget,
    )
    found.plan.to_yaml(out)
    write_json(json_path, found.to_dict())
    if plot is not None:
        plot_frontier(found, plot)
    print_search(found, out)


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    max_loss: MaxLoss = None,
    depth: Depth = None,
    pairs: Annotated[
        int | None, typer.Option(help="Find the best plan of so many pairs; 0 pairs none.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Pair this span of layers: 14-27 is layers 14 to 27.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="With --layers: layers a group.", show_default="2")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file (YAML).")] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Refit the wide layers, in closed form, to the original.",
            show_default="where a plan is searched",
        ),
    ] = None,
    max_group: MaxGroup = 2,
    budget: Budget = None,
    text: Texts = None,
    tokens: Annotated[
        int | None, typer.Option(help="To calibrate on.", show_default="65536")
    ] = None,
    own_text: OwnText = None,
    activation_dtype: Activations = DType.auto,
    workspace: Workspace = None,
    pad_heads: Annotated[
        int,
        typer.Option(
            metavar="N", help="Add heads of zeros until the head counts divide by N, for N ranks."
        ),
    ] = 1,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    shard_size: Annotated[str, typer.Option(help="Most bytes a weights file holds.")] = "5GB",
    force: Force = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Annotated[
        DType, typer.Option(help="Of the written weights; auto is the source's.")
    ] = DType.auto,
) -> None:
    """Write MODEL as a layer-parallel checkpoint to the directory OUT."""
    if sum(choice is not None for choice in (max_loss, depth, pairs, layers, plan)) != 1:
        raise TruedepthError(
            "Say how far to go with one of --max-loss, --depth, --pairs, or what to pair with one"
            " of --layers, --plan."
        )
    if group is not None and layers is None:
        raise TruedepthError("--group goes with --layers only.")
    searched = layers is None and plan is None and pairs != 0
    calibrate = searched if calibrate is None else calibrate
    if not (searched or calibrate) and (text or workspace or activation_dtype != DType.auto):
        raise TruedepthError("--text, --activation-dtype and --workspace go with --calibrate.")
    if not calibrate and (tokens is not None or own_text is not None):
        raise TruedepthError("--tokens and --own-text go with --calibrate.")
    if budget is not None and not searched:
        raise TruedepthError("--budget goes with --max-loss, --depth and --pairs.")
    limit = parse_loss(max_loss) if max_loss is not None else None
    read = Plan.from_yaml(plan) if plan is not None else None
    span = parse_span(layers) if layers is not None else None

    from truedepth.calibration.windows import given_text
    from truedepth.conversion import check_conversion
    from truedepth.conversion import convert as convert_model
    from truedepth.planning.search import SEARCH_TOKENS, search
    from truedepth.report.conversion import print_conversion

    source = trusted(model, allow_pickle, trust_remote_code)
    check_conversion(source, out, force, pad_heads)
    options = _calibration(text, tokens, own_text, device, activation_dtype, workspace, seed)
    if calibrate and searched:
        given_text(source, options, max_group)
    found: Search | None = None
    if span is not None:
        read = Plan.span(source.num_layers, *span, group=2 if group is None else group)
    elif pairs == 0:
        read = Plan(source.num_layers)
    elif searched:
        found = search(
            source,
            pairs=pairs,
            depth=depth,
            max_loss=limit,
            max_group=max_group,
            calibrate=calibrate,
            calibration=_calibration(
                text, SEARCH_TOKENS, own_text, device, activation_dtype, workspace, seed
            ),
            budget=budget,
        )
        read = found.plan
    assert read is not None  # one of the five was given
    if read.model not in (None, model, source.name):
        print(f"truedepth: note: the plan was made for {read.model}.", file=sys.stderr)
    done = convert_model(
        source,
        out,
        read,
        calibration=options if calibrate else None,
        dtype=dtype.torch(),
        pad_heads=pad_heads,
        shard_size=shard_size,
        force=force,
    )
    write_json(json_path, done.to_dict() | {"search": found.to_dict() if found else None})
    print_conversion(done, found)


def _calibration(
    text: list[Path] | None,
    tokens: int | None,
    own_text: float | None,
    device: str | None,
    activation_dtype: DType,
    workspace: Path | None,
    seed: int,
    dtype: DType = DType.auto,
) -> Calibration:
    from truedepth.calibration.options import Calibration

    return Calibration(
        text=text or (),
        tokens=tokens or Calibration.tokens,
        own_text=own_text,
        device=device,
        dtype=dtype.torch(),
        activation_dtype=activation_dtype.torch() or Calibration.activation_dtype,
        workspace=workspace,
        seed=seed,
    )


def parse_loss(text: str) -> float:
    """`0.05`, nats a token, as it is; `5%` more perplexity as nats a token.

    Raises:
        TruedepthError: The text has another form, or is not above 0.
    """
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise TruedepthError(
            f"{text!r} is not a loss above 0; write nats a token as 0.05, or perplexity as 5%."
        )
    return math.log1p(number / 100) if text.endswith("%") else number
