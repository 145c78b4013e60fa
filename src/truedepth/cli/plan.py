"""The commands that choose a plan and apply it: `plan` and `convert`."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from truedepth.calibration.options import Calibration
from truedepth.cli.commands import Fields, Given, command
from truedepth.cli.options import DType, JsonPath, Model, Out, trusted, writable, write_json
from truedepth.errors import TruedepthError
from truedepth.options import Bounds, Panel
from truedepth.plan.plan import Plan
from truedepth.plan.spans import parse_span
from truedepth.plan.stages import MAX_RANKS
from truedepth.planning.options import SEARCH_CALIBRATION, Merges

PYTHON_ONLY = ("check", "batch_size")
RENAMED = {"dtype": "compute_dtype"}  # of `convert`, whose --dtype is that of the written weights

DEVICE = "device"  # what --for takes instead of a link
PLAN, CALIBRATION = Panel("The plan"), "Calibration"

MaxLoss = Annotated[
    str | None,
    PLAN,
    typer.Option(
        help="Find the plan of fewest stages whose excess loss is at most this many nats per token"
        " (0.05), or whose perplexity rises by at most this share (5%)."
    ),
]
TpForLocal = Annotated[
    int | None,
    PLAN,
    Bounds(2, MAX_RANKS),
    typer.Option(metavar="N", help="Number of tensor-parallel ranks, with --local."),
]
Tp = Annotated[
    int | None,
    PLAN,
    Bounds(2, MAX_RANKS),
    typer.Option(metavar="N", help="Number of tensor-parallel ranks, with --local or --for."),
]
For = Annotated[
    str | None,
    PLAN,
    typer.Option(
        "--for",
        metavar="LINK",
        help="Find the plan within --max-loss that is predicted to decode fastest over this link"
        " between --tp N ranks (pcie-host or another that predict takes), or, as device, on one.",
    ),
]
Local = Annotated[
    bool,
    PLAN,
    typer.Option(
        "--local",
        help="Let stages be local to N ranks: between two all-reduces every rank goes on with what"
        " it has written itself. This loses less, saves no kernels, and runs over N ranks only.",
    ),
]
MergeOptions = Annotated[Given[Merges], Fields(Merges(), without=("local",), panel=PLAN.title)]


@command("truedepth.planning.search.search")
def plan(
    model: Model,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Plan file (YAML) to write.", callback=writable)
    ],
    max_loss: MaxLoss,
    all_reduces: Annotated[int | None, PLAN],
    depth: Annotated[float | None, PLAN],
    pairs: Annotated[int | None, PLAN],
    merges: MergeOptions,
    tp: Tp = None,
    local: Local = False,
    where: For = None,
    pad_heads: Annotated[int, PLAN, typer.Option(metavar="N")],
    calibrate: Annotated[bool, Panel(CALIBRATION)],
    frontier: Annotated[bool, PLAN],
    budget: Annotated[float | None, PLAN],
    calibration: Annotated[
        Given[Calibration],
        Fields(SEARCH_CALIBRATION, without=PYTHON_ONLY, panel=CALIBRATION),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the loss against all-reduces: .png, .svg or .pdf.", callback=writable
        ),
    ] = None,
    allow_pickle: bool,
    trust_remote_code: bool,
    json_path: JsonPath = None,
) -> None:
    """Find what of MODEL to merge: least loss at a number of stages, or fewest at a loss."""
    from truedepth.report.plots import check_plot, plot_frontier

    if sum(goal is not None for goal in (max_loss, all_reduces, depth, pairs)) != 1:
        raise TruedepthError(
            "Say how far to go with one of --max-loss, --all-reduces, --depth, --pairs."
        )
    check_for(where, tp, max_loss, local)
    ranks = local_ranks(tp if local else None, local)
    if plot is not None:
        check_plot(plot)
    limit = parse_loss(max_loss) if max_loss is not None else None
    options = calibration.over()

    from truedepth.planning.search import search
    from truedepth.report.search import print_search
    from truedepth.speed.links import parse_link
    from truedepth.speed.prediction import seconds_of_plans

    source = trusted(model, allow_pickle, trust_remote_code)
    seconds = None
    if where is not None:
        link = None if where == DEVICE else parse_link(where, f", or {DEVICE} for one device")
        seconds = seconds_of_plans(
            source, merges.over().max_group, ranks=tp or 1, link=link, device=options.device
        )
    found = search(
        source,
        pairs=pairs,
        depth=depth,
        all_reduces=all_reduces,
        max_loss=limit,
        merges=replace(merges.over(), local=ranks),
        calibrate=calibrate,
        calibration=options,
        frontier=frontier,
        budget=budget,
        pad_heads=pad_heads,
        seconds=seconds,
    )
    found.plan.to_yaml(out)
    write_json(json_path, found.to_dict() | ({"for": where, "tp": tp} if where else {}))
    if plot is not None:
        plot_frontier(found, plot)
    print_search(found, out, where)


@command("truedepth.conversion.convert", "truedepth.planning.search.search")
def convert(
    model: Model,
    out: Out,
    *,
    max_loss: MaxLoss,
    all_reduces: Annotated[int | None, PLAN],
    depth: Annotated[float | None, PLAN],
    pairs: Annotated[
        int | None,
        PLAN,
        Bounds(0),
        typer.Option(
            help="Find the best plan of this many pairs, or of wider groups that save as many"
            " layers. 0: convert the model as it is."
        ),
    ],
    layers: Annotated[
        str | None,
        PLAN,
        typer.Option(help="Pair the layers of this span: 14-27 is layers 14 to 27."),
    ] = None,
    group: Annotated[
        int | None,
        PLAN,
        Bounds(1),
        typer.Option(help="Layers per group, with --layers.", show_default="2"),
    ] = None,
    staggered: Annotated[
        str | None,
        PLAN,
        typer.Option(
            help="In this span (14-27) let every FFN but the last run beside the next layer's"
            " attention: one all-reduce less for each, at less loss than pairs of layers."
        ),
    ] = None,
    plan: Annotated[Path | None, PLAN, typer.Option(help="Plan file (YAML) to apply.")] = None,
    calibrate: Annotated[
        bool | None,
        Panel(CALIBRATION),
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Refit what is merged to the original, in closed form.",
            show_default="if a plan is searched",
        ),
    ] = None,
    merges: MergeOptions,
    tp: TpForLocal = None,
    local: Local = False,
    budget: Annotated[float | None, PLAN],
    calibration: Annotated[
        Given[Calibration],
        Fields(Calibration(), without=PYTHON_ONLY, renamed=RENAMED, panel=CALIBRATION),
    ],
    pad_heads: Annotated[int, typer.Option(metavar="N")],
    allow_pickle: bool,
    trust_remote_code: bool,
    shard_size: str,
    force: bool,
    json_path: JsonPath = None,
    dtype: DType = DType.auto,
) -> None:
    """Write MODEL as a layer-parallel checkpoint to the directory OUT."""
    goals = (max_loss, all_reduces, depth, pairs)
    if sum(each is not None for each in (*goals, layers, staggered, plan)) != 1:
        raise TruedepthError(
            "Say how far to go with one of --max-loss, --all-reduces, --depth, --pairs, or what"
            " runs together with one of --layers, --staggered, --plan."
        )
    if group is not None and layers is None:
        raise TruedepthError("--group goes with --layers only.")
    searched = layers is None and staggered is None and plan is None and pairs != 0
    calibrate = searched if calibrate is None else calibrate
    if budget is not None and not searched:
        raise TruedepthError("--budget goes with --max-loss, --all-reduces, --depth and --pairs.")
    if "form" in merges.said and not searched:
        raise TruedepthError("--form goes with --max-loss, --all-reduces, --depth and --pairs.")
    ranks = local_ranks(tp, local)
    if local and not searched and staggered is None:
        raise TruedepthError(
            "--local goes with --max-loss, --all-reduces, --depth and --staggered; a plan file says"
            " itself which stages are local."
        )
    _check_needed(calibration, searched, calibrate)
    limit = parse_loss(max_loss) if max_loss is not None else None
    chosen = Plan.from_yaml(plan) if plan is not None else None
    given = layers if staggered is None else staggered
    span = parse_span(given) if given is not None else None
    options = calibration.over()

    from truedepth.calibration.windows import given_text, tokens_needed
    from truedepth.conversion import check_conversion
    from truedepth.conversion import convert as convert_model
    from truedepth.planning.candidates import segments_to_merge
    from truedepth.planning.search import search
    from truedepth.report.conversion import print_conversion
    from truedepth.text import window_of
    from truedepth.widening.layout import Layout
    from truedepth.widening.padding import check_local, padded

    source = trusted(model, allow_pickle, trust_remote_code)
    check_conversion(source, out, force, pad_heads)
    source = padded(source, pad_heads)
    check_local(source, ranks)
    found = None
    if span is not None and staggered is not None:
        chosen = Plan.staggered(source.num_layers, *span, ranks=ranks)
    elif span is not None:
        chosen = Plan.span(source.num_layers, *span, group=2 if group is None else group)
    elif pairs == 0:
        chosen = Plan(source.num_layers)
    elif searched:
        original = Layout(source, Plan(source.num_layers))
        allowed = replace(merges.over(), local=ranks)
        if pairs is not None:
            allowed = replace(allowed, form="pairs")
        segments = segments_to_merge(original, allowed)
        refitted = [each for each in segments if original.is_merged(each)]
        if calibrate and refitted:
            given_text(source, options, refitted)
        window = window_of(source, options.window)
        needed = tokens_needed(source, refitted) + window  # in whole windows
        found = search(
            source,
            pairs=pairs,
            depth=depth,
            all_reduces=all_reduces,
            max_loss=limit,
            merges=allowed,
            calibrate=calibrate,
            calibration=replace(options, tokens=max(SEARCH_CALIBRATION.tokens, 2 * window, needed)),
            budget=budget,
        )
        chosen = found.plan
        layout = Layout(source, chosen)
        if calibrate and not any(map(layout.is_merged, layout.segments)):
            why = "its layers run side by side as they are"
            if layout.is_original:
                why = "it computes what the original computes"
            print(
                f"truedepth: note: nothing of the plan can be calibrated: {why}.", file=sys.stderr
            )
            calibrate = False
    assert chosen is not None  # one of the five was given
    if chosen.model not in (None, model, source.name):
        print(f"truedepth: note: the plan was made for {chosen.model}.", file=sys.stderr)
    done = convert_model(
        source,
        out,
        chosen,
        calibration=options if calibrate else None,
        dtype=dtype.torch(),
        shard_size=shard_size,
        force=force,
    )
    write_json(json_path, done.to_dict() | {"search": found.to_dict() if found else None})
    print_conversion(done, found)


def check_for(where: str | None, tp: int | None, max_loss: str | None, local: bool) -> None:
    """Refuse --for without what it needs, and --tp without --for or --local.

    Raises:
        TruedepthError: Something is missing or too much.
    """
    if where is None:
        if tp is not None and not local:
            raise TruedepthError("--tp N goes with --local or with --for LINK.")
        return
    if max_loss is None:
        raise TruedepthError("--for goes with --max-loss: it finds the fastest plan within a loss.")
    if (where == DEVICE) != (tp is None):
        raise TruedepthError(
            "--for LINK goes with --tp N, the number of ranks; --for device goes without."
        )


def local_ranks(tp: int | None, local: bool) -> int | None:
    """The number of ranks that stages may be local to, from --tp and --local.

    Raises:
        TruedepthError: One of them is missing.
    """
    if local and tp is None:
        raise TruedepthError(
            "--local goes with --tp N: local stages are for one number of tensor-parallel ranks."
        )
    if tp is not None and not local:
        raise TruedepthError("--tp goes with --local: other stages are for any number of ranks.")
    return tp


def _check_needed(calibration: Given[Calibration], searched: bool, calibrate: bool) -> None:
    """Refuse options of a calibration that nothing would use."""
    unused = ["tokens", "own_text"]
    if not searched:  # a search measures plans on this text, in this way
        unused += ["text", "window", "activation_dtype", "workspace", "dtype"]
    for name in unused:
        if name in calibration.said and not calibrate:
            raise TruedepthError(
                f"--{RENAMED.get(name, name).replace('_', '-')} goes with --calibrate."
            )


def parse_loss(text: str) -> float:
    """`0.05` is nats per token; `5%`, a rise of perplexity, is converted to nats per token.

    Raises:
        TruedepthError: The text has another form, or is not above 0.
    """
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise TruedepthError(
            f"{text!r} is not a loss above 0; write nats per token as 0.05, or perplexity as 5%."
        )
    return math.log1p(number / 100) if text.endswith("%") else number
