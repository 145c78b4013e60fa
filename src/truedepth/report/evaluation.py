"""What `eval` prints, for a terminal of 80 columns."""

from __future__ import annotations

from truedepth.evaluation.accuracy import Accuracy
from truedepth.evaluation.generation import Generation
from truedepth.evaluation.perplexity import Perplexity
from truedepth.evaluation.probes import Probes
from truedepth.report.tables import console, print_rows


def perplexity_rows(measured: Perplexity) -> list[tuple[str, str]]:
    """The rows that `truedepth eval` prints: a name and a value each."""
    rows = [
        ("model", measured.model),
        *([("original", measured.against)] if measured.against else []),
        ("text", measured.text),
        (
            "windows",
            f"{measured.windows} of {measured.window} tokens; {measured.tokens:,} predicted",
        ),
        ("NLL", f"{measured.nll:.4f} nats per token"),
        ("perplexity", f"{measured.perplexity:.2f}"),
    ]
    if measured.excess is None:
        return rows
    rows += [
        ("NLL of the original", f"{measured.against_nll:.4f} nats per token"),
        ("perplexity of the original", f"{measured.against_perplexity:.2f}"),
        ("excess loss", excess_text(measured) + " nats per token"),
        ("KL(original‖model)", f"{measured.kl:.4f} nats per token"),
        ("top-1 agreement", f"{measured.top1_agreement:.1%}"),
    ]
    return rows


def print_losses(measured: Perplexity) -> None:
    """Print losses on text."""
    print_rows(perplexity_rows(measured))


def print_generation(found: Generation) -> None:
    """Print what a model writes, beside what its original writes."""
    rows = [
        ("model", found.model),
        *([("original", found.against)] if found.against else []),
        ("prompts", f"{found.answers} of {found.prompts}"),
        ("answers", f"of at most {found.max_new_tokens} tokens, always the most likely one"),
        ("dtype", found.dtype),
    ]
    if found.agreement is not None:
        spread = "" if found.agreement_stderr is None else f" ± {found.agreement_stderr:.1%}"
        rows += [
            ("agreement", f"{found.agreement:.1%}{spread} of the original's tokens"),
            ("first difference", f"behind {found.followed:.1f} tokens on average"),
            ("identical answers", f"{found.identical:.1%}"),
        ]
    print_rows(rows)
    console().print()
    written = {"original": found.original, "model": found.written}
    print_rows(
        [
            (name, f"{each.length:.1f}", f"{each.ended:.1%}", f"{each.loops:.1%}")
            for name, each in written.items()
            if each is not None
        ],
        header=("answers of", "tokens", "ended by themselves", "ending in a loop"),
        words=(0,),
    )


def print_probes(found: Probes) -> None:
    """Print scores on probes."""
    print_rows(
        [
            ("model", found.model),
            *([("original", found.against)] if found.against else []),
            ("seed", str(found.seed)),
            ("dtype", found.dtype),
        ]
    )
    console().print()
    if found.against is None:
        print_rows(
            [(s.task, str(s.items), _score_text(s.value, s.stderr)) for s in found.scores],
            header=("probe", "items", "right"),
            words=(0,),
        )
        return
    print_rows(
        [
            (
                score.task,
                str(score.items),
                f"{score.against:.1%}",
                f"{score.value:.1%}",
                _score_text(score.difference or 0.0, score.difference_stderr, sign="+"),
            )
            for score in found.scores
        ],
        header=("probe", "items", "original", "model", "difference"),
        words=(0,),
    )


def print_scores(found: Accuracy) -> None:
    """Print scores on benchmarks; the average is over each task's first metric."""
    scores = found.scores
    shots = found.num_fewshot
    print_rows(
        [
            ("model", found.model),
            *([("original", found.against)] if found.against else []),
            ("examples", "each task's own number" if shots is None else f"{shots} per question"),
            ("dtype", found.dtype),
        ]
    )
    console().print()
    firsts = list({score.task: score for score in reversed(scores)}.values())[::-1]
    if found.against is None:
        rows = [
            (score.task, score.metric, str(score.items), _score_text(score.value, score.stderr))
            for score in scores
        ]
        average = sum(score.value for score in firsts) / len(firsts)
        rows.append(("average", "", "", f"{average:.1%}"))
        print_rows(rows, header=("task", "metric", "items", "score"), words=(0, 1))
        return
    compared = [
        (
            score.task,
            score.metric,
            str(score.items),
            f"{score.against:.1%}",
            f"{score.value:.1%}",
            _score_text(score.difference or 0.0, score.difference_stderr, sign="+"),
            "-" if score.kept is None else f"{score.kept:.1%}",
        )
        for score in scores
    ]
    ours = sum(score.value for score in firsts) / len(firsts)
    theirs = sum(score.against or 0.0 for score in firsts) / len(firsts)
    kept = f"{ours / theirs:.1%}" if theirs else "-"
    compared.append(
        ("average", "", "", f"{theirs:.1%}", f"{ours:.1%}", f"{ours - theirs:+.1%}", kept)
    )
    print_rows(
        compared,
        header=("task", "metric", "items", "original", "model", "difference", "kept"),
        words=(0, 1),
    )


def _score_text(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.1%}" + ("" if stderr is None else f" ± {stderr:.1%}")


def excess_text(measured: Perplexity) -> str:
    """`0.9198 ± 0.0212`: the excess and its standard error over windows."""
    spread = "" if measured.excess_stderr is None else f" ± {measured.excess_stderr:.4f}"
    return f"{measured.excess:.4f}{spread}"
