"""Tables for the terminal."""

from __future__ import annotations

from truedepth.report.tables import print_rows


def test_columns_are_aligned_by_what_they_hold(capsys):
    print_rows([("9", "prune", "1"), ("10", "2-parallel", "22")], ("Δ", "how", "loss"), words=(1,))
    assert capsys.readouterr().out.splitlines() == [
        " Δ  how         loss",
        " 9  prune          1",
        "10  2-parallel    22",
    ]


def test_without_a_header_all_columns_are_words(capsys):
    print_rows([("layers", "7"), ("KL", "0.1")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["layers  7", "KL      0.1"]
