from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from test_schedule import rebuilt, rebuilt_update
from torch.nn.functional import cosine_similarity
from transformers import CohereConfig

import forks
import truedepth as td
from tiny_models import byte_tokenizer, random_ids
from traced_models import model_of
from truedepth.depth_study.correlation import rank_correlation
from truedepth.depth_study.dependence import dependence, sublayer_dependence
from truedepth.depth_study.measurements import FILE, Measurements
from truedepth.depth_study.run import study
from truedepth.depth_study.schedule import Runner, Step, in_order, layer_evaluations
from truedepth.depth_study.transformations import (
    OF_SUBLAYERS,
    TRANSFORMATIONS,
    Cell,
    all_cells,
)
from truedepth.plan.stages import KINDS, Sublayer, stage_of


def in_stages(*stages):
    return tuple(Step(stage=stage_of(names.split())) for names in stages)


SIZE = {"window": 16, "windows": 3, "dtype": torch.float32}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and then the hat " * 200)
    return path


@pytest.mark.parametrize(
    ("transformation", "expected"),
    [
        ("prune", ()),
        ("merge", (Step((1, 2, 3, 4), "merge"),)),
        ("parallel", (Step((1, 2, 3, 4)),)),
        ("parallel (PAR)", (Step((1, 2, 3, 4), "par"),)),
        ("2-parallel", (Step((1, 2)), Step((3, 4)))),
        ("2-parallel (PAR)", (Step((1, 2), "par"), Step((3, 4), "par"))),
        ("3-parallel", (Step((1, 2, 3)), Step((4,)))),
        ("3-parallel (PAR)", (Step((1, 2, 3), "par"), Step((4,)))),
        ("staggered", in_stages("A1", "F1 A2", "F2 A3", "F3 A4", "F4")),
        ("A beside F", in_stages("A1 F1", "A2 F2", "A3 F3", "A4 F4")),
    ],
)
def test_transformations(transformation, expected):
    schedule = Cell(transformation, 1, 5).schedule(6)
    assert schedule == (*in_order([0]), *expected, *in_order([5]))


def test_shuffles_hold_every_layer_once_and_are_uniform():
    orders = [Cell("shuffle", 2, 5, k).schedule(6, seed=3)[2:5] for k in range(3000)]
    assert {tuple(sorted(order)) for order in orders} == {in_order([2, 3, 4])}
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
    assert Cell("shuffle", 0, 6, 1).schedule(6, 1) != Cell("shuffle", 0, 6, 1).schedule(6, 2)


def test_every_span_has_a_cell():
    cells = list(all_cells(6, permutations=3))
    assert len(cells) == len(set(cells)) == 21 * (len(TRANSFORMATIONS) + 2)
    coarse = {(cell.start, cell.end) for cell in all_cells(7, stride=3)}
    assert coarse == {(0, 3), (0, 6), (0, 7), (3, 6), (3, 7), (6, 7)}


def test_a_study_is_what_rebuilt_models_give(make_model, text, tmp_path):
    found = study(make_model(), tmp_path / "out", text=text, permutations=3, seed=5, **SIZE)
    loaded = td.load(make_model())
    layers = loaded.model.model.layers
    ids = torch.tensor(loaded.tokenizer(text.read_text())["input_ids"][:48]).view(3, 16)

    def nll(order):
        return rebuilt(loaded, [layers[i] for i in order], ids).mean().item()

    assert found.nll == pytest.approx(nll(range(6)), abs=1e-5)
    assert found.transformed["prune"][1][3] == pytest.approx(nll([0, 4, 5]), abs=1e-5)
    orders = [
        [step.layers[0] for step in Cell("shuffle", 1, 5, k).schedule(6, seed=5)] for k in range(3)
    ]
    values = torch.tensor([nll(order) for order in orders], dtype=torch.float64)
    assert found.transformed["shuffle"][1][4] == pytest.approx(values.mean().item(), abs=1e-5)
    assert found.shuffle_spread[1][4] == pytest.approx(values.std().item(), abs=1e-5)
    for name, matrix in found.transformed.items():
        for first in range(6):
            for last in range(6):
                assert (matrix[first][last] is None) == (first > last), name
        if name not in ("prune", "A beside F"):  # a span of one layer changes nothing
            assert [matrix[i][i] for i in range(6)] == pytest.approx([found.nll] * 6, abs=1e-6)


def test_pairs_are_what_conversion_writes(make_model, text, tmp_path):
    found = study(make_model(), tmp_path / "study", text=text, **SIZE)
    td.convert(make_model(), tmp_path / "out", td.Plan(6, [[1, 2], [3, 4]]))
    measured = td.perplexity(tmp_path / "out", text=text, window=16, windows=3)
    assert found.transformed["2-parallel"][1][4] == pytest.approx(measured.nll, abs=1e-5)
    row = next(row for row in found.sweep if row.paired_layers == 4)
    assert row.effective_depth == 4
    assert row.last_layers == [3, 4, 5]
    assert row.nll[1] == pytest.approx(measured.nll, abs=1e-5)
    assert row.best_nll == min(row.nll) == row.nll[row.last_layers.index(row.best_last_layer)]


@pytest.mark.parametrize("name", OF_SUBLAYERS)
def test_stages_are_what_conversion_writes(make_model, text, tmp_path, name):
    found = study(make_model(), tmp_path / "study", text=text, transformations=[name], **SIZE)
    plans = {
        "staggered": td.Plan.staggered(6, 1, 4),
        "A beside F": td.Plan(
            6, stages=[[Sublayer(k, kind) for kind in KINDS] for k in (1, 2, 3, 4)]
        ),
    }
    td.convert(make_model(), tmp_path / "out", plans[name])
    measured = td.perplexity(tmp_path / "out", text=text, window=16, windows=3)
    assert found.transformed[name][1][4] == pytest.approx(measured.nll, abs=1e-5)
    saved = 12 - plans[name].all_reduces
    candidates = {
        found.transformed[name][first][first + 3]: (first, first + 3) for first in range(3)
    }
    best = found.best_spans[saved][name]
    assert ((best.first, best.last), best.nll) == (candidates[min(candidates)], min(candidates))


def test_where_attention_and_ffn_read_one_state(make_model, text, tmp_path):
    model = make_model(family=CohereConfig)
    found = study(model, tmp_path / "study", text=text, stride=3, **SIZE)
    assert set(found.transformed) == set(TRANSFORMATIONS) - set(OF_SUBLAYERS)
    interaction = found.sublayer_dependence["interaction"]
    assert [interaction[2 * k][2 * k + 1] for k in range(6)] == [0.0] * 6
    assert all(interaction[2 * k + 1][2 * k + 2] > 0 for k in range(5))
    with pytest.raises(td.TruedepthError, match="'staggered' changes nothing in"):
        study(model, tmp_path / "other", text=text, transformations=["staggered"], **SIZE)


@torch.no_grad()
def test_layers_of_different_parameters_have_no_mean(text, tmp_path):
    """The first layers of a mixture of experts may be dense."""
    model_of("deepseek_v3").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = {"text": text, "stride": 3, **SIZE}
    found = study(tmp_path / "model", tmp_path / "out", **options)
    assert {"prune", "2-parallel", "staggered"} < found.transformed.keys()
    assert "merge" not in found.transformed
    with pytest.raises(td.TruedepthError, match="'merge' takes the mean of layers"):
        study(tmp_path / "model", tmp_path / "out", transformations=["merge"], **options)


def test_dependence_of_sublayers_by_the_definitions(make_model):
    loaded = td.load(make_model())
    ids = random_ids(2, 13)
    measures = sublayer_dependence(Runner(loaded, ids))
    body, (first, second) = loaded.model.model, (loaded.model.model.layers[i] for i in (1, 2))
    rotary = body.rotary_emb(body.embed_tokens(ids), position_ids=torch.arange(13)[None])

    def attention(layer, x):
        return layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary)[0]

    def ffn(layer, x):
        return layer.mlp(layer.post_attention_layernorm(x))

    def mean_norm(y):
        return y.norm(dim=-1).mean().item()

    x = loaded.model(ids, output_hidden_states=True).hidden_states
    read = x[1] + attention(first, x[1])  # what F1 reads
    added = ffn(first, read)
    lost = attention(second, x[2] - added) - attention(second, x[2])
    expected = mean_norm(lost) / mean_norm(attention(second, x[2]))
    assert measures["interaction"][3, 4] == pytest.approx(expected, rel=1e-4)
    size = mean_norm(attention(first, x[1])) / mean_norm(read)
    assert measures["update size"][2, 3] == pytest.approx(size, rel=1e-5)
    similarity = cosine_similarity(x[1], read, -1).mean().item()
    assert measures["input similarity"][2, 3] == pytest.approx(similarity, rel=1e-5)
    for matrix in measures.values():
        assert torch.equal(matrix.isnan(), torch.ones(12, 12).tril().bool())


@torch.no_grad()
def test_dependence_by_the_definitions(make_model):
    loaded = td.load(make_model())
    ids = random_ids(2, 13)
    measures = dependence(Runner(loaded, ids))
    x = loaded.model(ids, output_hidden_states=True).hidden_states
    f_1 = rebuilt_update(loaded, 1, x[1])
    f_4 = rebuilt_update(loaded, 4, x[4])

    def mean_norm(y):
        return y.norm(dim=-1).mean().item()

    lost = rebuilt_update(loaded, 4, x[4] - f_1) - f_4
    assert measures["interaction"][1, 4] == pytest.approx(
        mean_norm(lost) / mean_norm(f_4), rel=1e-4
    )
    assert measures["update size"][1, 4] == pytest.approx(
        mean_norm(f_1) / mean_norm(x[4]), rel=1e-5
    )
    similarity = cosine_similarity(x[1], x[4], -1).mean().item()
    assert measures["input similarity"][1, 4] == pytest.approx(similarity, rel=1e-5)
    for matrix in measures.values():
        assert torch.equal(matrix.isnan(), torch.ones(6, 6).tril().bool())


def test_rank_correlation():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 9, (40,), generator=generator).tolist()  # with ties
    second = torch.rand(40, generator=generator).tolist()
    expected = stats.spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert math.isnan(rank_correlation([1, 2], [1, 2]))


def test_a_study_goes_on_where_it_stopped(make_model, text, tmp_path, monkeypatch):
    whole = study(make_model(), tmp_path / "whole", text=text, **SIZE)
    study(make_model(), tmp_path / "parts", text=text, transformations=["prune"], **SIZE)
    path = tmp_path / "parts" / FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:20])  # killed while it wrote a line
    parts = study(make_model(), tmp_path / "parts", text=text, **SIZE)
    assert parts.transformed == whole.transformed
    monkeypatch.setattr(Measurements, "add", lambda *_: pytest.fail("added"))
    again = study(make_model(), tmp_path / "parts", text=text, transformations=["prune"], **SIZE)
    assert again == whole


def test_two_runs_do_not_share_a_directory(make_model, text, tmp_path):
    study(make_model(), tmp_path / "out", text=text, stride=3, **SIZE)
    identity = json.loads((tmp_path / "out" / FILE).read_text().splitlines()[0])["measured_on"]
    with (
        Measurements(tmp_path / "out", identity),
        pytest.raises(td.TruedepthError, match="Another run is using"),
    ):
        study(make_model(), tmp_path / "out", text=text, stride=3, **SIZE)


def test_correlations_are_among_neighbours_and_among_spans_of_a_length(make_model, text, tmp_path):
    found = study(make_model(num_hidden_layers=8), tmp_path / "out", text=text, **SIZE)
    parallel = found.transformed["parallel"]
    for name, matrix in found.dependence.items():
        neighbours = [(matrix[i][i + 1], parallel[i][i + 1]) for i in range(7)]
        expected = stats.spearmanr(*zip(*neighbours, strict=True)).statistic
        assert found.correlation[name]["pairs"] == pytest.approx(expected)
        merges = [(found.transformed["A beside F"][k][k], k, k) for k in range(8)]
        merges += [(found.transformed["staggered"][k][k + 1], k, k + 1) for k in range(7)]
        merges.sort(key=lambda merge: merge[1:])
        between = found.sublayer_dependence[name]
        expected = stats.spearmanr(
            [between[k][k + 1] for k in range(15)], [loss for loss, *_ in merges]
        ).statistic
        assert found.correlation[name]["merges"] == pytest.approx(expected)
        within = []
        for length in (2, 3, 4):  # five spans or more
            rows = []
            for first in range(8 - length + 1):
                span = range(first, first + length)
                inside = [matrix[i][j] for i, j in itertools.combinations(span, 2)]
                rows.append((statistics.mean(inside), parallel[first][first + length - 1]))
            within.append(stats.spearmanr(*zip(*rows, strict=True)).statistic)
        assert found.correlation[name]["spans"] == pytest.approx(statistics.mean(within))


def test_layers_are_counted_before_they_are_evaluated(make_model):
    runner = Runner(td.load(make_model()), random_ids(1, 8))
    schedules = [cell.schedule(6) for cell in all_cells(6)]
    list(runner.run(schedules))
    assert runner.evaluated == layer_evaluations(schedules)
    for schedule in schedules[::7]:
        alone = Runner(td.load(make_model()), random_ids(1, 8))
        list(alone.run([schedule]))
        merges = sum(step.form == "merge" for step in schedule)
        single = sum(len(step.layers) for step in schedule if step.form != "merge")
        single += sum(len(step.stage) for step in schedule) / 2
        assert alone.evaluated == layer_evaluations([schedule]) == merges + single


def test_a_killed_study_keeps_its_cells(make_model, text, tmp_path):
    code = (
        "import sys, truedepth as td\n"
        "from truedepth.depth_study.measurements import Measurements\n"
        "add = Measurements.add\n"
        "def slowly(self, schedule, nll):\n"
        "    add(self, schedule, nll); print('kept', flush=True)\n"
        "Measurements.add = slowly\n"
        "td.study(sys.argv[1], sys.argv[2], text=sys.argv[3], window=16, windows=3)"
    )
    with forks.begun(code, make_model(), tmp_path / "out", text) as running:
        running.wait_for("kept", times=5)
        running.kill()
    lines = (tmp_path / "out" / FILE).read_text().splitlines()
    assert len(lines) >= 6
    assert json.loads(lines[5])["nll"]


def test_a_change_anywhere_in_the_weights_is_another_model(make_model, tmp_path):
    shutil.copytree(make_model(), tmp_path / "copy")
    tensors = {n: t.read().clone() for n, t in td.open_source(make_model()).tensors.items()}
    assert td.open_source(tmp_path / "copy").fingerprint == td.open_source(make_model()).fingerprint
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 2]}))
    assert td.open_source(tmp_path / "copy").fingerprint == td.open_source(make_model()).fingerprint
    tensors["model.layers.3.mlp.down_proj.weight"][30, 40] += 0.5
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    assert td.open_source(tmp_path / "copy").fingerprint != td.open_source(make_model()).fingerprint


def test_another_study_is_not_mixed_in(make_model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a hat on a mat " * 300)
    options = {"transformations": ["prune"], "stride": 3, **SIZE}
    study(make_model(), tmp_path / "out", text=text, **options)
    changes = [
        (make_model(num_key_value_heads=4), text, {}, "model fingerprint"),
        (make_model(), other, {}, "text fingerprint"),
        (make_model(), text, {"windows": 2}, "windows"),
        (make_model(), text, {"dtype": torch.bfloat16}, "dtype"),
    ]
    for model, source, change, words in changes:
        with pytest.raises(td.TruedepthError, match=f"another {words}"):
            study(model, tmp_path / "out", text=source, **options | change)
    seeds = study(make_model(), tmp_path / "out", text=text, seed=7, **options)
    assert seeds.settings["seed"] == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": 10**4}, "fewer --windows"),
        ({"window": 10**5}, "longer than the .* positions"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"permutations": 0}, "permutations must be at least 1"),
        ({"transformations": ["melt"]}, "'melt' is not a transformation"),
    ],
)
def test_bad_settings(make_model, text, tmp_path, change, words):
    with pytest.raises(td.TruedepthError, match=words):
        study(make_model(), tmp_path / "out", text=text, **SIZE | change)
    assert not (tmp_path / "out").exists()


def test_directories_that_hold_something_else(make_model, text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE).write_text("{}\n")
    for name, words in [("full", "holds no study"), ("bad", "damaged")]:
        with pytest.raises(td.TruedepthError, match=words):
            study(make_model(), tmp_path / name, text=text, **SIZE)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_medians_are_over_all_spans_of_a_length(make_model, text, tmp_path):
    found = study(make_model(), tmp_path / "out", text=text, **SIZE)
    assert {name: list(row) for name, row in found.medians.items()} == {
        name: [2, 4] for name in TRANSFORMATIONS
    }
    losses = [found.transformed["merge"][i][i + 3] - found.nll for i in range(3)]
    assert found.medians["merge"][4] == statistics.median(losses)


MEASURE = """
import re, sys, threading, time
from pathlib import Path
import torch
from truedepth.depth_study.run import study

small, model, out, text = sys.argv[1:]
options = {"window": 16, "windows": 5, "stride": 4, "permutations": 1, "dtype": torch.bfloat16}

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

study(small, out + "/small", text=text, **options)  # what libraries take at first use
before, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
study(model, out + "/large", text=text, **options)
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
def test_weights_stay_in_their_files(make_model, text, tmp_path):
    """The pages of a map can go and come back, so a model may be larger than memory.

    transformers (5.23) maps weights on a CPU where the dtype is the file's.
    """
    width = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 12}
    model = make_model(dtype=torch.bfloat16, shard_size="100MB", **width)
    size = sum(tensor.nbytes for tensor in td.open_source(model).tensors.values())
    paths = [make_model(dtype=torch.bfloat16), model, tmp_path, text]
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert size > 300e6
    # The mean of layers is a layer in memory, made through matrices in float32. The one before it
    # may still be there: Python collects what is in cycles when it likes.
    layer = size / 12
    assert layer < int(done.stdout) < 5 * layer
