"""What `eval` shows, as tables for a terminal of 80 columns and for the model card."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

from truedepth.evaluation.accuracy import Accuracy
from truedepth.evaluation.generation import Generation, Written
from truedepth.evaluation.perplexity import Perplexity
from truedepth.evaluation.probes import Probes
from truedepth.evaluation.scores import TaskScore
from truedepth.report.tables import Rows

Found = Perplexity | Accuracy | Generation | Probes


def title_of(found: Found) -> str:
    """What was measured, as a heading."""
    if isinstance(found, Perplexity):
        return f"Loss on {Path(found.text).name}"
    if isinstance(found, Accuracy):
        return f"Benchmarks: {', '.join(dict.fromkeys(score.task for score in found.scores))}"
    return "Generation" if isinstance(found, Generation) else "Probes"


def tables_of(found: Found) -> list[Rows]:
    """The tables of a measurement."""
    if isinstance(found, Perplexity):
        return [Rows(_losses(found))]
    if isinstance(found, Accuracy):
        return _scores(found)
    return _generation(found) if isinstance(found, Generation) else _probes(found)


def _losses(measured: Perplexity) -> list[tuple[str, str]]:
    rows = [
        ("model", measured.model),
        *([("original", measured.against)] if measured.against else []),
        ("text", Path(measured.text).name),
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


def _generation(found: Generation) -> list[Rows]:
    """What a model writes, beside what its original writes."""
    rows = [
        ("model", found.model),
        *([("original", found.against)] if found.against else []),
        ("prompts", f"{found.answers} of {Path(found.prompts).name}"),
        ("answers", f"of at most {found.max_new_tokens} tokens, always the most likely one"),
        ("dtype", found.dtype),
    ]
    if found.agreement is not None:
        agreement = _score_text(found.agreement, found.agreement_stderr)
        rows += [
            ("agreement", f"{agreement} of the original's tokens"),
            ("original itself", f"{found.itself:.1%}: what rounding leaves"),
            ("first difference", f"behind {found.followed:.1f} tokens on average"),
            ("identical answers", f"{found.identical:.1%}"),
        ]
    both = {"original": found.original, "model": found.written}
    written = [
        (name, f"{each.length:.1f}", f"{each.ended:.1%}", f"{each.loops:.1%}")
        for name, each in both.items()
        if each is not None
    ]
    if (change := found.difference) is not None:
        length, ended, loops = astuple(found.difference_stderr or Written(0.0, 0.0, 0.0))
        written.append(
            (
                "difference",
                f"{change.length:+.1f}" + (f" ± {length:.1f}" if length else ""),
                _score_text(change.ended, ended, sign="+"),
                _score_text(change.loops, loops, sign="+"),
            )
        )
    header = ("answers of", "tokens", "ended by themselves", "ending in a loop")
    return [Rows(rows), Rows(written, header)]


def _probes(found: Probes) -> list[Rows]:
    """Scores on probes."""
    settings = Rows(
        [
            ("model", found.model),
            *([("original", found.against)] if found.against else []),
            ("seed", str(found.seed)),
            ("dtype", found.dtype),
        ]
    )
    if found.against is None:
        alone = [(s.task, str(s.items), _score_text(s.value, s.stderr)) for s in found.scores]
        return [settings, Rows(alone, header=("probe", "items", "right"))]
    compared = Rows(
        [
            (
                score.task,
                str(score.items),
                f"{score.against:.1%}",
                f"{score.value:.1%}",
                difference_text(score),
                kept_text(score),
            )
            for score in found.scores
        ],
        header=("probe", "items", "original", "model", "difference", "kept"),
    )
    return [settings, compared]


def _scores(found: Accuracy) -> list[Rows]:
    """Scores on benchmarks; the average is over each task's first metric."""
    scores = found.scores
    shots = found.num_fewshot
    settings = Rows(
        [
            ("model", found.model),
            *([("original", found.against)] if found.against else []),
            ("examples", "each task's own number" if shots is None else f"{shots} per question"),
            ("dtype", found.dtype),
        ]
    )
    firsts = list({score.task: score for score in reversed(scores)}.values())[::-1]
    if found.against is None:
        rows = [
            (score.task, score.metric, str(score.items), _score_text(score.value, score.stderr))
            for score in scores
        ]
        average = sum(score.value for score in firsts) / len(firsts)
        rows.append(("average", "", "", f"{average:.1%}"))
        return [settings, Rows(rows, ("task", "metric", "items", "score"), words=(0, 1))]
    compared = [
        (
            score.task,
            score.metric,
            str(score.items),
            f"{score.against:.1%}",
            f"{score.value:.1%}",
            difference_text(score),
            kept_text(score),
        )
        for score in scores
    ]
    ours = sum(score.value for score in firsts) / len(firsts)
    theirs = sum(score.against or 0.0 for score in firsts) / len(firsts)
    kept = f"{ours / theirs:.1%}" if theirs else "-"
    compared.append(
        ("average", "", "", f"{theirs:.1%}", f"{ours:.1%}", f"{ours - theirs:+.1%}", kept)
    )
    header = ("task", "metric", "items", "original", "model", "difference", "kept")
    return [settings, Rows(compared, header, words=(0, 1))]


def _score_text(value: float, stderr: float | None, sign: str = "") -> str:
    """A score, and its error unless all items are alike, which says nothing of others."""
    return f"{value:{sign}.1%}" + (f" ± {stderr:.1%}" if stderr else "")


def difference_text(score: TaskScore) -> str:
    """`-4.0% ± 2.8%`: the difference from the original's score and its error over items."""
    if score.difference == score.difference_stderr == 0:
        return "no item differs"
    return _score_text(score.difference or 0.0, score.difference_stderr, sign="+")


def kept_text(score: TaskScore) -> str:
    """`97.9%`: what is kept of the original's score."""
    return "-" if score.kept is None else f"{score.kept:.1%}"


def excess_text(measured: Perplexity) -> str:
    """`0.9198 ± 0.0212`: the excess and its standard error over windows."""
    spread = "" if measured.excess_stderr is None else f" ± {measured.excess_stderr:.4f}"
    return f"{measured.excess:.4f}{spread}"
