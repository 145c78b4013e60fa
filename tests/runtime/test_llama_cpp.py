"""Exported files in llama.cpp itself, against transformers."""

import itertools
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import truedepth as td
from gguf_files import MODELS, PAIRS, PUBLISHED, converted, sentencepiece, with_words
from tiny_models import random_ids
from truedepth.cli.app import app
from truedepth.runtime.llama_cpp import Context
from truedepth.speed.timing import Engine, Task

pytestmark = pytest.mark.gguf

TEXTS = (
    "the cat sat on the mat",
    "  two spaces, a\ttab\n\n\nlines   \n and 1234567 numbers 3.14",
    "I'll say IT'S 100% don't—naïve café 東京 🙂 <end> x",
    "def f(x):\n    return x ** 2  # comment\n",
    "Hello!\n\nI'll see the 12 cats, she'll see camelCase zzz",
)


@pytest.fixture
def llama_cpp():
    """The package as released, which is not there where these tests are only collected."""
    import llama_cpp

    return llama_cpp


@pytest.fixture(scope="module", params=MODELS)
def pair(request, make_model, tmp_path_factory):
    """A checkpoint in transformers, and its export in llama.cpp."""
    directory = tmp_path_factory.mktemp("llama_cpp")
    checkpoint = converted(make_model, directory, *MODELS[request.param])
    td.export(checkpoint, directory / "out.gguf")
    return td.load(checkpoint).model, td.load(directory / "out.gguf").model


@torch.inference_mode()
def check(expected, found):
    """Both `[…, vocabulary]` logits."""
    assert (expected - found).abs().max() < 2e-3
    logp, other = (logits.double().log_softmax(-1) for logits in (expected, found))
    assert (logp.exp() * (logp - other)).sum(-1).mean() < 1e-8
    assert expected.std() > 0.1  # there is something to agree on


@torch.inference_mode()
def test_full_forward(pair):
    ids = random_ids(3, 40)
    check(pair[0](ids).logits, pair[1](ids).logits)


@torch.inference_mode()
def test_token_by_token(pair):
    ids = random_ids(1, 40)
    steps = [pair[1](ids[:, :end], logits_to_keep=1).logits for end in range(1, 41)]
    check(pair[0](ids).logits, torch.cat(steps, 1))


@torch.inference_mode()
def test_more_tokens_than_a_batch_and_a_text_that_goes_on_otherwise(make_model, tmp_path):
    checkpoint = converted(make_model, tmp_path, {"max_position_embeddings": 2048}, PAIRS)
    td.export(checkpoint, tmp_path / "out.gguf")
    original, exported = td.load(checkpoint).model, td.load(tmp_path / "out.gguf").model
    ids = random_ids(1, 1100)
    check(original(ids).logits[:, -700:], exported(ids, logits_to_keep=700).logits)
    other = torch.cat([ids[:, :600], random_ids(1, 30, seed=2)], 1)
    check(original(other).logits[:, -1:], exported(other, logits_to_keep=1).logits)
    assert len(exported.context.held) == 630
    check(original(ids[:, :50]).logits, exported(ids[:, :50]).logits)


@torch.inference_mode()
def test_padding_on_either_side(pair):
    ids = random_ids(2, 12)
    for mask in (
        torch.tensor([[1] * 12, [0] * 5 + [1] * 7]),
        torch.tensor([[1] * 12, [1] * 7 + [0] * 5]),
    ):
        found = pair[1](ids, attention_mask=mask).logits
        for row in range(2):
            real = mask[row].bool()
            check(pair[0](ids[row : row + 1, real]).logits[0], found[row, real])


def test_greedy_text(pair):
    ids = random_ids(2, 9)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    assert torch.equal(pair[0].generate(ids, **options), pair[1].generate(ids, **options))


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The default model with layers 14 to 27 in pairs, and its directory."""
    directory = tmp_path_factory.mktemp("default")
    td.convert("default", directory / "out", td.Plan.span(30, 14, 27))
    td.export(directory / "out", directory / "out.gguf")
    return directory


def test_the_default_model(default, prose):
    tokenizer = td.load(default / "out").tokenizer
    ids = tokenizer(prose.read_text()[:1500], return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = td.load(default / "out").model(ids).logits
        exported = td.load(default / "out.gguf").model
        check(expected, exported(ids).logits)
        steps = [exported(ids[:, :end], logits_to_keep=1).logits for end in range(1, 30)]
        check(expected[:, :29], torch.cat(steps, 1))
    found = td.perplexity(default / "out.gguf", against=default / "out", windows=2, window=128)
    assert abs(found.excess) < 1e-5 and abs(found.kl) < 1e-7


def test_the_default_model_in_llama_cpps_own_interface(default, llama_cpp):
    """Loaded as released, with its own tokenizer and chat format."""
    model = llama_cpp.Llama(str(default / "out.gguf"), n_ctx=512, verbose=False)
    original = td.load(default / "out").tokenizer
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False) == original(text)["input_ids"]
    said = model.create_chat_completion(
        [{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=12,
        temperature=0,
    )
    ours = CliRunner().invoke(
        app,
        [
            *("generate", str(default / "out.gguf"), "What is the capital of France?"),
            *("--max-new-tokens", "12"),
        ],
    )
    assert said["choices"][0]["message"]["content"].strip() == ours.output.strip()
    assert len(ours.output.strip()) > 5


def test_k_quants(default, tmp_path):
    done = td.export(default / "out", tmp_path / "out.gguf", type="q4_k_m")
    assert done.type == "q4_k_m" and done.size == (tmp_path / "out.gguf").stat().st_size
    assert {"Q4_K", "F32"} < done.tensors.keys() and "BF16" not in done.tensors
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    whole = (default / "out.gguf").stat().st_size
    assert done.size < 0.25 * whole
    found = td.perplexity(tmp_path / "out.gguf", against=default / "out", windows=2, window=128)
    assert 0.001 < found.kl < 0.5
    assert td.open_source(tmp_path / "out.gguf").config == td.open_source(default / "out").config


def test_splits_into_words_differ():
    """Or the next test would say nothing."""
    found = {name: [with_words(name)(text)["input_ids"] for text in TEXTS] for name in PUBLISHED}
    for name, other in itertools.combinations(found, 2):
        assert found[name] != found[other], (name, other)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_are_the_originals(make_model, llama_cpp, name, tmp_path):
    checkpoint = converted(make_model, tmp_path, {}, PAIRS)
    tokenizer = with_words(name)
    tokenizer.save_pretrained(checkpoint)
    td.export(checkpoint, tmp_path / "out.gguf")
    model = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=512, verbose=False)
    for text in TEXTS:
        assert (
            model.tokenize(text.encode(), add_bos=False, special=True)
            == tokenizer(text)["input_ids"]
        )
        assert td.open_source(tmp_path / "out.gguf").tokenizer(text) == tokenizer(text)


def test_sentencepiece_tokens_are_the_originals(make_model, llama_cpp, tmp_path):
    checkpoint = converted(make_model, tmp_path, {"bos_token_id": 1, "eos_token_id": 2}, PAIRS)
    tokenizer = sentencepiece()
    tokenizer.save_pretrained(checkpoint)
    td.export(checkpoint, tmp_path / "out.gguf")
    model = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=512, verbose=False)
    for text in ("the cat sat", "cats the  he\nté 🙂", " the", "<s>the", "</s>"):
        assert model.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"]


def test_bench(default, tmp_path):
    td.convert("default", tmp_path / "base", td.Plan(30))
    td.export(tmp_path / "base", tmp_path / "base.gguf", type="q8_0")
    command = [
        *("bench", str(default / "out.gguf"), "--against", str(tmp_path / "base.gguf")),
        *("--engine", "llama.cpp", "--lengths", "16", "--repetitions", "2"),
        *("--json", str(tmp_path / "j")),
    ]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0 and "llama.cpp 0." in said.output
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert [row["case"]["task"] for row in rows] == list(Task)
    assert all(row["speedup"] > 0 for row in rows)
    for more, words in (
        (["--batch", "2"], "--batch 1"),
        (["--tp", "2"], "drop --tp"),
        (["--dtype", "float16"], "drop --tp and --dtype"),
        (["--engine", "transformers"], "give --engine llama.cpp"),
    ):
        assert words in str(CliRunner().invoke(app, [*command, *more]).exception)
    with pytest.raises(td.TruedepthError, match="not a GGUF file"):
        td.bench(default / "out", engine=Engine.llama_cpp)


def test_what_does_not_run_in_llama_cpp(default, prose, tmp_path):
    with pytest.raises(td.TruedepthError, match="cannot draft or check"):
        from truedepth.runtime.generation import answer

        answer(td.load(default / "out"), "hello", draft=td.load(default / "out.gguf"))
    with pytest.raises(td.TruedepthError, match="heal the checkpoint it was exported from"):
        td.heal(default / "out.gguf", tmp_path / "healed", teacher="default")


def test_a_file_that_llama_cpp_refuses(default, tmp_path):
    shutil.copy(default / "out.gguf", tmp_path / "broken.gguf")
    with (tmp_path / "broken.gguf").open("r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(td.TruedepthError, match=r"llama.cpp cannot load .*broken.gguf: \w+"):
        Context(tmp_path / "broken.gguf")
