"""Stages behind vLLM's HTTP server over two ranks, asked as users ask: by the `openai` client."""

from __future__ import annotations

import string
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import truedepth as td
from serving import serving
from tiny_models import staged_logits

pytestmark = pytest.mark.vllm

STAGES = [["F0", "A1"], ["F1", "A2"], ["F2", "A3", "F3"], ["F4", "A5"]]
WHOLE = [["A0"], *STAGES[:2], STAGES[2], ["A4"], STAGES[3], ["F5"]]
"""The same with the sub-layers that are alone, for the plain formula."""

ROOM = 480
"""Tokens that the server has room for, prompt and answer."""

TEMPLATE = (
    "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "the cat sat on the"
MESSAGES = [
    {"role": "system", "content": "You are a hat."},
    {"role": "user", "content": "Who sat on the mat?"},
]


@pytest.fixture(scope="module")
def original(make_model, tmp_path_factory):
    """A random model that answers in printable ASCII, so that texts can be compared."""
    path = tmp_path_factory.mktemp("original")
    source = make_model(hidden_size=128, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    plain = set(string.ascii_letters + string.digits + string.punctuation + " ")
    with torch.no_grad():
        for token in range(model.config.vocab_size):
            if token == 0 or not set(tokenizer.decode([token])) <= plain:  # 0 would end the text
                model.lm_head.weight[token] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("serving") / "staged"
    td.convert(original, out, td.Plan(6, stages=STAGES))
    return out


@pytest.fixture(scope="module")
def loaded(converted):
    return td.load(converted, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def server(converted, tmp_path_factory):
    """The server of all tests here; the last one ends it."""
    log = tmp_path_factory.mktemp("log") / "server"
    options = ("--dtype", "float32", "--max-model-len", str(ROOM), "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with serving(converted, 2, log, *options) as running:
            yield running


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=120, max_retries=0)


def ids_of(loaded, prompt):
    """Token ids of a text, or of messages."""
    if isinstance(prompt, str):
        return loaded.tokenizer(prompt)["input_ids"]
    text = loaded.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return loaded.tokenizer(text)["input_ids"]


def continued(loaded, prompt, length):
    """Token ids with which transformers continues a prompt, and their text."""
    ids = torch.tensor([ids_of(loaded, prompt)])
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
    )
    found = out[0, ids.shape[1] :].tolist()
    return found, loaded.tokenizer.decode(found, skip_special_tokens=True)


def ask(client, prompt, length, **options):
    """A greedy completion."""
    return client.completions.create(
        model="model", prompt=prompt, max_tokens=length, temperature=0, **options
    )


def test_a_completion_is_the_text_of_transformers(client, loaded):
    found = ask(client, PROMPT, 24)
    wanted, text = continued(loaded, PROMPT, 24)
    assert found.choices[0].text == text
    assert found.usage.prompt_tokens == len(ids_of(loaded, PROMPT))
    assert found.usage.completion_tokens == len(wanted)


def test_a_chat_is_the_text_of_transformers(client, loaded):
    found = client.chat.completions.create(
        model="model", messages=MESSAGES, max_tokens=24, temperature=0
    )
    assert found.choices[0].message.content == continued(loaded, MESSAGES, 24)[1]
    assert found.usage.prompt_tokens == len(ids_of(loaded, MESSAGES))


def test_streams_join_to_the_same_texts(client, loaded):
    pieces = [each.choices[0].text for each in ask(client, PROMPT, 24, stream=True)]
    assert "".join(pieces) == continued(loaded, PROMPT, 24)[1]
    assert len(pieces) > 10
    chunks = client.chat.completions.create(
        model="model", messages=MESSAGES, max_tokens=24, temperature=0, stream=True
    )
    pieces = [each.choices[0].delta.content or "" for each in chunks]
    assert "".join(pieces) == continued(loaded, MESSAGES, 24)[1]


def test_sixteen_at_once(client, loaded):
    """Their lengths make prompts and single tokens share passes."""
    prompts = ["the cat " * (1 + 3 * i) + chr(ord("a") + i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda prompt: ask(client, prompt, 32).choices[0].text, prompts))
    assert found == [continued(loaded, prompt, 32)[1] for prompt in prompts]
    assert len(set(found)) == 16


def test_a_stop_string_ends_the_text_before_it(client, loaded):
    text = continued(loaded, PROMPT, 24)[1]
    stop = text[9:12]
    found = ask(client, PROMPT, 24, stop=[stop]).choices[0]
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_formula(client, loaded, original):
    """What the original's own layers give in these stages, without this package's classes."""
    plain = AutoModelForCausalLM.from_pretrained(original)
    prompt = ids_of(loaded, PROMPT)
    tokens, _ = continued(loaded, PROMPT, 24)
    logits = staged_logits(plain, torch.tensor([prompt + tokens]), WHOLE)[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens
    wanted = logits.log_softmax(-1).max(-1).values.tolist()
    found = ask(client, PROMPT, 24, logprobs=1).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(wanted, abs=1e-3)

    tokens, _ = continued(loaded, MESSAGES, 5)
    ids = torch.tensor([ids_of(loaded, MESSAGES) + tokens])
    wanted = staged_logits(plain, ids, WHOLE)[0, -6:-1].log_softmax(-1).topk(3)
    options = {"max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    found = client.chat.completions.create(model="model", messages=MESSAGES, **options)
    for each, top in zip(found.choices[0].logprobs.content, wanted.values.tolist(), strict=True):
        assert [other.logprob for other in each.top_logprobs] == pytest.approx(top, abs=1e-3)


def test_a_prompt_that_is_too_long_is_an_error_that_says_so(client):
    from openai import BadRequestError

    said = rf"maximum context length is {ROOM} tokens.*{ROOM + 20} input tokens"
    with pytest.raises(BadRequestError, match=said):
        ask(client, [5] * (ROOM + 20), 4)
    assert ask(client, PROMPT, 4).choices[0].finish_reason == "length"  # it serves others still


def test_a_killed_rank_ends_the_server_and_all_requests(client, server):
    """The last test: it leaves no server."""
    import psutil

    family = psutil.Process(server.process.pid).children(recursive=True)
    workers = [each for each in family if "".join(each.cmdline()).startswith("VLLM::Worker")]
    assert len(workers) == 2

    answered = [threading.Event() for _ in range(8)]

    def keep_asking(each):
        for _ in range(1000):
            if each % 2:
                ask(client, [5, 9 + each], 200)
            else:
                list(ask(client, [5, 9 + each], 200, stream=True))
            answered[each].set()

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, each) for each in range(8)]
        assert all(each.wait(60) for each in answered)
        workers[1].kill()
        server.process.wait(60)
        assert all(each.exception(60) is not None for each in asking)
    assert "died unexpectedly" in server.log.read_text()

    def running(each):
        try:
            return each.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + 30  # some are still ending when their parent has ended
    while any(map(running, family)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not list(filter(running, family))
