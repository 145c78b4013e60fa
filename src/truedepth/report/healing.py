"""What `heal` prints, for a terminal of 80 columns."""

from __future__ import annotations

from truedepth.healing.run import Healed
from truedepth.report.tables import print_rows


def print_healing(done: Healed) -> None:
    """Print what was trained on, and the distance from the original before and after."""
    repeats = done.tokens / done.text_tokens
    trained = f"{done.tokens:,} tokens" + (
        f"; the text has {done.text_tokens:,}, so each was read {repeats:.1f} times"
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
    print("\nOn held-out windows, in nats per token:\n")
    print_rows(
        [
            (
                name,
                *(
                    f"{row['excess']:.4f} ± {row['stderr']:.4f}",
                    f"{done.record.at_least}{row['kl']:.4f}",
                ),
            )
            for name, row in (("before", before), ("after", after))
        ],
        header=("", "excess loss", "KL"),
    )
    if not after["loss"] < before["loss"]:
        print(
            "\nTraining did not help: the loss on held-out windows did not fall. Keep the"
            "\ncheckpoint that it started from, or try a lower --learning-rate or more --tokens."
        )
