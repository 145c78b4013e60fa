"""`eval`: one of four measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from truedepth.cli.commands import command
from truedepth.cli.options import (
    Device,
    DType,
    JsonPath,
    Model,
    Weights,
    prepare,
    trusted,
    write_json,
)
from truedepth.errors import TruedepthError
from truedepth.options import Bounds, Panel

TEXT, TASKS = Panel("Text"), Panel("Benchmarks, with --tasks")
GENERATION, PROBES = Panel("Generation, with --generation"), Panel("Probes, with --probes")


@command(
    "truedepth.evaluation.perplexity.perplexity",
    "truedepth.evaluation.accuracy.task_scores",
    "truedepth.evaluation.generation.generation",
    "truedepth.evaluation.probes.probe",
)
def evaluate(
    model: Model,
    *,
    against: Annotated[
        str | None,
        typer.Option(help="The original, measured on the same tokens, items or prompts."),
    ] = None,
    text: Annotated[Path | None, TEXT],
    window: Annotated[int | None, TEXT],
    windows: Annotated[
        int,
        Bounds(0),
        TEXT,
        typer.Option(help="Number of windows, from the beginning of the text; 0: all."),
    ] = 64,
    tasks: Annotated[
        str | None,
        TASKS,
        typer.Option(help="Benchmarks instead of text, separated by commas: piqa,arc_easy,…"),
    ] = None,
    task_dir: Annotated[
        Path | None,
        TASKS,
        typer.Option(help="Directory of the tasks' JSONL files.", show_default="from the hub"),
    ] = None,
    num_fewshot: Annotated[int | None, TASKS],
    limit: Annotated[int | None, TASKS],
    chat: Annotated[bool, TASKS],
    run_code: Annotated[bool, TASKS],
    generation: Annotated[
        bool,
        GENERATION,
        typer.Option(
            "--generation",
            help="What the model writes instead of text: how far its greedy answers follow the"
            " original's, how long they are, and how many end in a loop.",
        ),
    ] = False,
    prompts: Annotated[Path | None, GENERATION],
    max_new_tokens: Annotated[int, GENERATION],
    raw: Annotated[bool, GENERATION],
    probes: Annotated[
        bool,
        PROBES,
        typer.Option(
            "--probes",
            help="Small tasks that --seed makes instead of text: arithmetic, brackets, copying,"
            " look-up, sentences in long texts.",
        ),
    ] = False,
    items: Annotated[int, PROBES],
    lengths: Annotated[
        str,
        PROBES,
        typer.Option(help="Tokens of the long texts, separated by commas."),
    ] = "1024,2048,4096,8192",
    batch_size: Annotated[
        str, typer.Option(help="Windows, items or prompts per forward pass: a number or auto.")
    ] = "auto",
    card: Annotated[
        bool,
        typer.Option("--card", help="Also write the figures into the model card of MODEL."),
    ] = False,
    allow_pickle: bool,
    trust_remote_code: bool,
    json_path: JsonPath = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Random seed for choosing examples and making probes; the default is"
            " lm-evaluation-harness's."
        ),
    ] = 1234,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Measure loss on text, benchmarks, generation or probes; --against adds the original's."""
    _check_together(
        {"--text": text, "--tasks": tasks, "--generation": generation, "--probes": probes},
        {
            "--task-dir": task_dir,
            "--num-fewshot": num_fewshot,
            "--limit": limit,
            "--chat": chat or None,
            "--run-code": run_code or None,
        },
        {"--prompts": prompts, "--raw": raw or None},
    )
    batch = _batch_size(batch_size)
    sizes = _lengths(lengths)
    prepare(seed)

    from truedepth.checkpoint.card import card_of, with_figures
    from truedepth.files.atomic import whole_file
    from truedepth.report.evaluation import tables_of, title_of
    from truedepth.report.tables import print_tables

    measured, original = (
        trusted(each, allow_pickle, trust_remote_code) if each is not None else None
        for each in (model, against)
    )
    assert measured is not None
    readme = card_of(measured) if card else None
    options: dict[str, Any] = {"against": original, "device": device, "dtype": dtype.torch()}
    if tasks is not None:
        from truedepth.evaluation.accuracy import task_scores

        found: Any = task_scores(
            measured,
            [name.strip() for name in tasks.split(",") if name.strip()],
            task_dir=task_dir,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=chat,
            run_code=run_code,
            batch_size=batch or "auto",
            seed=seed,
            **options,
        )
    elif generation:
        from truedepth.evaluation.generation import generation as answers

        found = answers(
            measured,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            raw=raw,
            batch_size=batch or 8,
            **options,
        )
    elif probes:
        from truedepth.evaluation.probes import probe

        found = probe(measured, items=items, lengths=sizes, batch_size=batch, seed=seed, **options)
    else:
        from truedepth.evaluation.perplexity import perplexity

        found = perplexity(
            measured,
            text=text,
            window=window,
            windows=windows or None,
            batch_size=batch or 4,
            **options,
        )
    write_json(json_path, found.to_dict())
    tables = tables_of(found)
    print_tables(tables)
    if readme is not None:
        figures = "\n\n".join(each.markdown() for each in tables)
        with_them = with_figures(readme.read_text(encoding="utf-8"), title_of(found), figures)
        with whole_file(readme) as partial:
            partial.write_text(with_them, encoding="utf-8")


def _check_together(
    asked: Mapping[str, object],
    of_tasks: Mapping[str, object],
    of_generation: Mapping[str, object],
) -> None:
    """Refuse two measurements at once, and options of one that is not asked for."""
    several = [name for name, value in asked.items() if value not in (None, False)]
    if len(several) > 1:
        raise TruedepthError(f"{several[0]} and {several[1]} are two measurements; run eval twice.")
    if "--tasks" not in several and any(value is not None for value in of_tasks.values()):
        raise TruedepthError(f"{', '.join(of_tasks)} go with --tasks.")
    if "--generation" not in several and any(v is not None for v in of_generation.values()):
        raise TruedepthError("--prompts and --raw go with --generation.")


def _batch_size(text: str) -> int | None:
    """A number, or None for auto."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise TruedepthError(f"--batch-size must be a number or auto, not {text!r}.")
    return None if text == "auto" else int(text)


def _lengths(text: str) -> list[int]:
    """Numbers that commas separate."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if odd := next((word for word in words if not word.isdecimal()), None):
        raise TruedepthError(f"--lengths must be numbers such as 1024,2048, not {odd!r}.")
    return list(map(int, words))
