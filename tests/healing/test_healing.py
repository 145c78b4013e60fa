"""Healing: which weights are trained, toward what, and runs that are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import forks
import truedepth as td
from family_models import options_of
from tiny_models import torchrun
from truedepth.cli import app as cli
from truedepth.evaluation.loss import window_measures
from truedepth.families.lookup import original_family
from truedepth.healing.distillation import Distillation
from truedepth.healing.options import Healing, Objective, TextPart, Train
from truedepth.healing.student import is_trained, original_beside, student_of
from truedepth.healing.teacher import KeptPredictions, Original
from truedepth.healing.text import (
    document_tokens,
    packed,
    part_documents,
    text_parts,
    training_text,
)
from truedepth.report.healing import print_healing
from truedepth.runtime.generation import answer
from truedepth.widening.layout import Layout

PLAN = td.Plan(6, [[1, 2], [4, 5]])
NAMES = ("converted", "out")


@pytest.fixture(scope="module")
def converted(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("healing") / "converted"
    td.convert(make_model(), out, PLAN)
    return out


def student_to_train(source, train):
    family = original_family(source.config, str(source.path))
    return student_of(source, is_trained(family, Layout.of(source), train), torch.float32)


def weights(path):
    return load_file(path / "model.safetensors")


def changed(before, after):
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_wide_layers_change_and_the_loss_falls(make_model, converted, options, tmp_path):
    done = td.heal(converted, tmp_path / "out", teacher=make_model(), healing=options)
    names = changed(weights(converted), weights(tmp_path / "out"))
    assert names == {
        name
        for name in weights(converted)
        if name.startswith(("model.layers.1.", "model.layers.3."))
    }
    before, after = done.curve[0], done.curve[-1]
    assert [row["step"] for row in done.curve] == [0, 4, 8, 12]
    assert after["kl"] < 0.9 * before["kl"]
    record = json.loads((tmp_path / "out" / "config.json").read_text())["truedepth"]["healing"]
    assert record["text"] == {"text.txt": done.text_tokens}
    assert record["validation"]["after"] == min(done.curve, key=lambda row: row["kl"])
    assert "trained toward the original" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    measured = td.perplexity(tmp_path / "out", against=make_model(), window=32, windows=4)
    assert measured.kl > 0


def test_all_weights_can_be_trained(make_model, converted, options, tmp_path):
    everything = replace(options, train=Train.all)
    td.heal(converted, tmp_path / "out", teacher=make_model(), healing=everything)
    assert changed(weights(converted), weights(tmp_path / "out")) == set(weights(converted))


def test_lora_is_merged_and_can_be_kept(make_model, converted, options, tmp_path):
    from peft import PeftModel

    lora = replace(options, train=Train.lora, rank=4, learning_rate=1e-2)
    done = td.heal(
        converted,
        tmp_path / "out",
        teacher=make_model(),
        healing=lora,
        keep_adapter=tmp_path / "adapter",
    )
    names = changed(weights(converted), weights(tmp_path / "out"))
    assert names == {
        f"model.layers.{layer}.{name}.weight"
        for layer in (1, 3)
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    }
    assert done.curve[-1]["kl"] < 0.9 * done.curve[0]["kl"]
    base = td.load(converted).model
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = td.load(tmp_path / "out").model
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_takes_the_same_steps(
    make_model, converted, options, tmp_path, monkeypatch
):
    calls = {"plain": 0, "saving": 0}
    forward = LlamaAttention.forward

    for name, saving in (("plain", False), ("saving", True)):

        def counted(self, *inputs, name=name, **more):
            calls[name] += torch.is_grad_enabled()
            return forward(self, *inputs, **more)

        monkeypatch.setattr(LlamaAttention, "forward", counted)
        changes = replace(options, tokens=256, gradient_checkpointing=saving)
        td.heal(converted, tmp_path / name, teacher=make_model(), healing=changes)
    assert calls["saving"] > 1.4 * calls["plain"] > 0
    plain, saving = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    assert changed(weights(converted), plain)
    for name in plain:
        torch.testing.assert_close(plain[name], saving[name], atol=1e-6, rtol=1e-4)


def test_tied_embeddings_stay_tied(make_model, options, tmp_path):
    model = make_model(tie_word_embeddings=True)
    td.convert(model, tmp_path / "converted", PLAN)
    assert "lm_head.weight" not in weights(tmp_path / "converted")
    everything = replace(options, train=Train.all, tokens=256)
    done = td.heal(tmp_path / "converted", tmp_path / "out", teacher=model, healing=everything)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "converted").keys()
    assert done.curve[-1]["kl"] < done.curve[0]["kl"]


def test_a_model_beside_itself_has_neither_loss_nor_gradient(make_model, tmp_path):
    """Layers that run in parallel keep their places, so the checkpoint can be its own original."""
    td.convert(make_model(**options_of("gemma2")), tmp_path / "out", PLAN)
    source = td.open_source(tmp_path / "out")
    student, model = (student_of(source, lambda name: True, torch.float32) for _ in range(2))
    itself = Original(model)
    both = Distillation(student, itself, itself, Layout.of(source), Objective(hidden=1.0))
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = both(ids, torch.arange(2))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    largest = max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None)
    assert largest < 1e-6


@pytest.mark.parametrize("objective", [Objective(), Objective(0.3, 2.0, 0.5), Objective(1.0)])
def test_the_loss_is_as_written_down(make_model, converted, objective):
    source, original = td.open_source(converted), td.open_source(make_model())
    student = student_of(
        source, is_trained(original.family, Layout.of(source), Train.paired), torch.float32
    )
    model = original_beside(student, original, Layout.of(source), torch.float32)
    ids = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    teacher = Original(model)
    found = Distillation(student, teacher, teacher, Layout.of(source), objective)(
        ids, torch.arange(3)
    )
    ours, theirs = (
        each(ids, output_hidden_states=True) for each in (td.load(converted).model, model)
    )
    t = objective.temperature
    p, q = ((x.logits[:, :-1] / t).log_softmax(-1) for x in (theirs, ours))
    kl = t**2 * (p.exp() * (p - q)).sum(-1).mean()
    nll = torch.nn.functional.cross_entropy(ours.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    pairs = [(2, 3), (4, 6)]  # after layers 1 and 3 of the student, 2 and 5 of the original
    errors = [
        (
            (ours.hidden_states[i] - theirs.hidden_states[j]).pow(2).sum(-1)
            / theirs.hidden_states[j].pow(2).sum(-1)
        ).mean()
        for i, j in pairs
    ]
    a, b = objective.next_token, objective.hidden
    expected = (1 - a) * kl + a * nll + b * sum(errors) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_is_frozen_and_the_same_is_in_memory_once(make_model, converted):
    source, original = td.open_source(converted), td.open_source(make_model())
    student = student_of(
        source, is_trained(original.family, Layout.of(source), Train.paired), torch.float32
    )
    teacher = original_beside(student, original, Layout.of(source), torch.float32)
    ours = {id(parameter) for parameter in student.parameters()}
    own = {n for n, parameter in teacher.named_parameters() if id(parameter) not in ours}
    paired = tuple(f"model.layers.{layer}." for layer in (1, 2, 4, 5))
    assert own == {n for n, _ in teacher.named_parameters() if n.startswith(paired)}
    everything = student_of(
        source, is_trained(original.family, Layout.of(source), Train.all), torch.float32
    )
    teacher = original_beside(everything, original, Layout.of(source), torch.float32)
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in everything.parameters()}


def test_kept_predictions_say_what_the_original_says(make_model, converted, tmp_path):
    source, original = td.open_source(converted), td.open_source(make_model())
    student = student_of(
        source, is_trained(original.family, Layout.of(source), Train.paired), torch.float32
    )
    model = original_beside(student, original, Layout.of(source), torch.float32)
    ids = torch.randint(320, (5, 16), generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([4, 0, 2])
    objective = Objective(0.3, 2.0)

    def loss_and_measures(teacher, validation):
        both = Distillation(student, teacher, validation, Layout.of(source), objective)
        with torch.no_grad():
            return both(ids[numbers], numbers), both(ids[numbers], numbers, measure=True)

    exact, measured = loss_and_measures(Original(model), Original(model))
    for count in (20, 320):
        kept = [KeptPredictions(tmp_path / f"{count} at {t}", 5, 16, count, t) for t in (2.0, 1.0)]
        for each in kept:
            each.fill(model, ids, 0, 2)
            each.fill(model, ids, 1, 2)
        loss, rows = loss_and_measures(*kept)
        torch.testing.assert_close(rows[:, [0, 1, 3]], measured[:, [0, 1, 3]])
        if count == 320:
            torch.testing.assert_close(loss, exact, atol=0, rtol=0.02)
            torch.testing.assert_close(rows[:, 2], measured[:, 2], atol=0, rtol=0.02)
        else:  # all other tokens count as one
            assert loss < exact
            assert (rows[:, 2] < measured[:, 2]).all()


def test_healing_by_kept_predictions(make_model, converted, options, tmp_path, monkeypatch):
    monkeypatch.setattr("truedepth.healing.run.original_beside", None)
    kept = replace(options, keep_predictions=320)
    done = td.heal(converted, tmp_path / "out", teacher=make_model(), healing=kept)
    assert done.curve[-1]["kl"] < 0.9 * done.curve[0]["kl"]


def test_validation_measures_are_those_of_eval(make_model, converted, options, tmp_path):
    done = td.heal(
        converted, tmp_path / "out", teacher=make_model(), healing=replace(options, tokens=128)
    )
    ours, theirs = td.load(converted).model, td.load(make_model()).model
    source = td.open_source(converted)
    documents = document_tokens(part_documents(options.text[0].name), source)
    windows = list(packed(documents, source, 32))
    aside = torch.tensor(windows[4:12])  # after the four that are trained on
    assert done.record.validation.windows == len(aside)
    rows = []
    with torch.no_grad():
        for ids in aside:
            a, b = (model(ids[None]).logits[0, :-1] for model in (ours, theirs))
            rows.append(window_measures(ids[1:], [a.__getitem__], b.__getitem__)[0])
    expected = torch.stack(rows).mean(0)
    before = done.curve[0]
    assert before["nll"] == pytest.approx(expected[0].item(), abs=1e-4)
    assert before["excess"] == pytest.approx((expected[0] - expected[1]).item(), abs=1e-4)
    assert before["kl"] == pytest.approx(expected[2].item(), abs=1e-4)


KILLED = """
import os, sys
from truedepth.cli.app import main
from truedepth.healing.training import _Trainer
step = _Trainer.training_step
def once(self, *inputs):
    if self.state.global_step == 6: os.kill(os.getpid(), 9)
    return step(self, *inputs)
_Trainer.training_step = once
main()
"""


def command_line(converted, out, model, prose, tokens, eval_every):
    words = f"heal {converted} {out} --teacher {model} --text {prose} --tokens {tokens}"
    words += f" --sequence-length 32 --batch-size 4 --micro-batch-size 2 --eval-every {eval_every}"
    return (words + " --validation 8 --device cpu").split()


@pytest.fixture
def all_of_it(tmp_path):
    """Options for answers of the original's own and windows that the student writes the end of."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\nthe dog on the mat\n")
    answers = ["--own-answers", str(prompts), "--answer-tokens", "12"]
    return [*answers, "--on-policy", "0.5", "--rollout", "8"]


def test_a_killed_run_resumes_and_ends_with_the_same_weights(
    make_model, converted, prose, all_of_it, tmp_path
):
    def run(out, seed="0", code=forks.COMMAND):
        words = command_line(converted, tmp_path / out, make_model(), prose, 1536, 4)
        words += ["--seed", seed, "--plot", tmp_path / f"{out}.svg"]
        return forks.python(code, *words, *all_of_it)

    def drawn(out):
        picture = (tmp_path / f"{out}.svg").read_text()
        assert "excess loss" in picture
        return re.findall(r' d="(.*?)"', picture, re.DOTALL)

    assert run("whole").returncode == 0
    assert run("killed", code=KILLED).returncode == -9
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.healing" / "checkpoints" / "checkpoint-4").is_dir()
    other = run("killed", seed="1")
    assert other.returncode == 2
    assert "other settings" in other.stderr
    assert "seed 0" in other.stderr
    done = run("killed")
    assert done.returncode == 0, done.stderr
    assert "step 8 of 12" in done.stderr
    assert "step 4 of 12" not in done.stderr
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert drawn("whole") == drawn("killed")
    assert not (tmp_path / ".killed.healing").exists()


def test_two_processes_take_the_same_steps(make_model, converted, prose, all_of_it, tmp_path):
    """Also where the text ends within a step and is read again."""
    short, prompts = tmp_path / "short.txt", tmp_path / "prompts.txt"
    short.write_text(prose.read_text()[:400])
    prompts.write_text("\n".join(f"the cat sat on mat {number}" for number in range(16)))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", [sys.executable]), ("two", torchrun(2))):
        words = command_line(converted, tmp_path / name, make_model(), short, 512, 2)
        words += [*all_of_it, "--answer-temperature", "0"]
        line = ["-m", "truedepth", *words, "--tensorboard", str(tmp_path / f"{name}-logs")]
        done = subprocess.run([*launcher, *line], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("excess loss") == 1
        assert len(list((tmp_path / f"{name}-logs").rglob("events.*"))) == 1
    made = json.loads((tmp_path / "one" / "config.json").read_text())["truedepth"]
    read = made["healing"]["text"]
    assert set(read) == {"short.txt", "answers to prompts.txt"}
    assert 0 < min(read.values()) < sum(read.values()) < 512
    assert sum(read.values()) % 128  # a pass ends within a step
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    start = weights(converted)
    for name in changed(start, one):
        torch.testing.assert_close(
            one[name] - start[name], two[name] - start[name], atol=2e-6, rtol=1e-2
        )
    assert changed(start, one) == changed(start, two)


@pytest.mark.parametrize("train", [Train.paired, Train.lora])
def test_a_healed_checkpoint_is_like_any_other(make_model, options, tmp_path, train):
    """It loads without truedepth's classes, generates text, and is exported in its own dtype."""
    model = make_model(tie_word_embeddings=True)
    td.convert(model, tmp_path / "converted", PLAN, dtype=torch.bfloat16)
    changes = replace(options, tokens=512, train=train, learning_rate=1e-2)
    td.heal(tmp_path / "converted", tmp_path / "out", teacher=model, healing=changes)
    held = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in NAMES)
    assert after["truedepth"].pop("healing") is not None
    before["truedepth"].pop("healing", None)
    assert after == before
    loaded = td.load(tmp_path / "out")
    remote = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    ids = torch.randint(1, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(remote(ids).logits, loaded.model(ids).logits)
        assert not torch.equal(
            loaded.model(ids).logits, td.load(tmp_path / "converted").model(ids).logits
        )
    written = answer(loaded, "the cat", max_new_tokens=8)
    start = loaded.tokenizer("the cat", return_tensors="pt").input_ids
    expected = remote.generate(start, max_new_tokens=8, do_sample=False)
    assert written.ids == tuple(expected[0, start.shape[1] :].tolist())
    assert td.export(tmp_path / "out", tmp_path / "out.gguf").type == "bf16"
    exported = td.open_source(tmp_path / "out.gguf").tensors
    assert exported.keys() == held.keys()
    for name, tensor in held.items():
        assert torch.equal(exported[name].read().to(tensor.dtype), tensor), name
    with pytest.raises(td.TruedepthError, match="--force"):
        td.heal(tmp_path / "converted", tmp_path / "out", teacher=model, healing=changes)


def test_training_that_does_not_help_is_reported(make_model, converted, options, tmp_path, capsys):
    worse = replace(options, learning_rate=0.5, tokens=512, eval_every=2)
    done = td.heal(converted, tmp_path / "out", teacher=make_model(), healing=worse)
    print_healing(done)
    assert "Training did not help" in capsys.readouterr().out
    better = td.heal(converted, tmp_path / "other", teacher=make_model(), healing=options)
    print_healing(better)
    assert "did not help" not in capsys.readouterr().out


def test_the_best_step_is_kept(make_model, converted, options, tmp_path):
    """The last step is not kept if it is worse: here the loss falls first and rises later."""
    rising = replace(options, learning_rate=0.02, warmup=1.0, eval_every=1)
    done = td.heal(converted, tmp_path / "out", teacher=make_model(), healing=rising)
    trained = done.curve[1:]
    best = min(trained, key=lambda row: row["kl"])
    assert best["step"] < trained[-1]["step"] and best["kl"] < trained[-1]["kl"]
    assert done.record.validation.after == best
    source = td.open_source(converted)
    parts = text_parts(options.text, source, 0)
    text = training_text(parts, source, tmp_path / "text", length=32, windows=48, validation=8)
    aside = text.validation.long()
    ours, theirs = td.load(tmp_path / "out").model, td.load(make_model()).model
    with torch.no_grad():
        p, q = (model(aside).logits[:, :-1].log_softmax(-1) for model in (theirs, ours))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl == pytest.approx(best["kl"], abs=1e-4)


def test_a_loss_that_is_not_a_number_stops_the_run(make_model, converted, options, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    held = weights(broken)
    held["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(held, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(td.TruedepthError, match=r"The loss is nan at step 1\..*--learning-rate"):
        td.heal(broken, tmp_path / "out", teacher=make_model(), healing=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tokens": 100}, "100 tokens are less than one step of 4 windows of 32"),
        ({"sequence_length": 1024, "tokens": 4096}, "longer than the 512 positions"),
        ({"batch_size": 3}, "3 windows per step are not a multiple of 2 windows per pass"),
        ({"dtype": torch.float16}, "float32 or bfloat16, not float16"),
        ({"keep_predictions": 9, "objective": Objective(hidden=1.0)}, "drop --keep-predictions"),
        ({"text": [TextPart("nowhere.txt")]}, "Cannot read the text nowhere.txt"),
    ],
)
def test_options_that_do_not_fit(make_model, converted, options, tmp_path, wrong, words):
    with pytest.raises(td.TruedepthError, match=words):
        td.heal(
            converted, tmp_path / "out", teacher=make_model(), healing=replace(options, **wrong)
        )
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_belong_together(make_model, converted, options, tmp_path):
    def heal(checkpoint, teacher):
        td.heal(checkpoint, tmp_path / "out", teacher=teacher, healing=options)

    with pytest.raises(td.TruedepthError, match="not a checkpoint that truedepth has made"):
        heal(make_model(), make_model())
    with pytest.raises(td.TruedepthError, match=r"not the original of .* a model of 6 layers"):
        heal(converted, make_model(num_hidden_layers=4))
    with pytest.raises(td.TruedepthError, match="hidden_size differs, 32 and 64"):
        heal(converted, make_model(hidden_size=32))
    tuned = AutoModelForCausalLM.from_pretrained(make_model())
    with torch.no_grad():
        tuned.model.embed_tokens.weight[3] += 0.01
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(td.TruedepthError, match=r"the same shape, and another model\.embed_tokens"):
        heal(converted, tmp_path / "tuned")
    td.convert(make_model(), tmp_path / "unpaired", td.Plan(6))
    with pytest.raises(td.TruedepthError, match="nothing to heal"):
        heal(tmp_path / "unpaired", make_model())


def given(monkeypatch, *words):
    """The options from a command line, or None if it is refused."""
    asked = []

    def heal(*_, healing, **__):
        asked.append(healing)
        raise td.TruedepthError("asked")

    monkeypatch.setattr("truedepth.healing.run.heal", heal)
    monkeypatch.setattr("truedepth.cli.heal.trusted", lambda model, *_: model)
    monkeypatch.setattr(sys, "argv", ["truedepth", "heal", "a", "b", "--teacher", "c", *words])
    with pytest.raises(SystemExit):
        cli.main()
    return asked[0] if asked else None


def test_the_command_without_options_is_the_default(monkeypatch):
    assert given(monkeypatch) == Healing()


def test_options_override_the_papers_recipe(monkeypatch):
    paper = given(monkeypatch, "--recipe", "paper")
    assert (paper.objective.next_token, paper.learning_rate) == (1.0, 1e-4)
    assert (paper.batch_size, paper.schedule, paper.train) == (32, "linear", "paired")
    assert paper.text == Healing.text
    other = given(monkeypatch, "--recipe", "paper", "--learning-rate", "3e-4", "--next-token", "0")
    assert other == replace(paper, learning_rate=3e-4, objective=Objective())


def test_options_for_lora_only(monkeypatch, capsys):
    assert given(monkeypatch, "--rank", "8") is None
    assert given(monkeypatch, "--keep-adapter", "d") is None
    said = capsys.readouterr().err
    assert "--rank goes with --train lora" in said
    assert "--keep-adapter goes with --train lora" in said


def test_options_for_answers_only(monkeypatch, capsys):
    assert given(monkeypatch, "--answer-tokens", "8") is None
    assert given(monkeypatch, "--answer-share", "0.25") is None
    said = capsys.readouterr().err
    assert "--answer-tokens goes with --own-answers" in said
    assert "--answer-share goes with --own-answers" in said
    found = given(monkeypatch, "--own-answers", "text", "--answer-share", "0.25")
    assert (found.own_answers, found.answer_share) == ((TextPart("text"),), 0.25)


def test_logs_for_tensorboard(make_model, converted, options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = replace(options, tensorboard=tmp_path / "logs")
    done = td.heal(converted, tmp_path / "out", teacher=make_model(), healing=logged)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    kl = events.Scalars("eval/kl")
    assert [(e.step, pytest.approx(e.value)) for e in kl] == [
        (row["step"], row["kl"]) for row in done.curve
    ]
