"""vLLM's engines for tests, forked from one process that has imported vLLM.

An engine is a process for the requests, one for the scheduler and one per rank, and on CPUs vLLM
spawns them: each imports vLLM again, which takes longer than all that a tiny model computes. Here
they are forked, as vLLM does on GPUs. The tests of its HTTP server have spawned ones.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMPORTED = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
    "torch._inductor.compile_fx",
    "truedepth.engines.vllm.models",
)
"""What engines import late; one that is not there costs time only."""

Continued = tuple[list[int], list[float]]
"""The tokens that follow a prompt, and the log probability of each."""


class Engines:
    """A process that forks an engine per call of `serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def serve(
        self, options: dict[str, Any], prompts: list[list[int]], length: int, log: Path
    ) -> list[Continued]:
        """How an engine with these options continues prompts, greedily.

        Raises:
            AssertionError: with its log, if the engine ends without an answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = log.with_suffix(".json")
        answer.unlink(missing_ok=True)
        print(
            json.dumps([options, prompts, length, str(log), str(answer)]), file=self._process.stdin
        )
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ended\n", log.read_text()
        assert answer.exists(), log.read_text()
        found: list[Continued] = json.loads(answer.read_text())
        return found


@contextlib.contextmanager
def engines() -> Iterator[Engines]:
    """`Engines` until the context ends."""
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        yield Engines(process)


def answer_and_end(
    options: dict[str, Any], prompts: list[list[int]], length: int, log: str, answer: str
) -> None:
    """What a forked process does: write its output to `log` and what it found to `answer`."""
    import torch
    from vllm import LLM, SamplingParams

    torch._dynamo.config.disable = options["enforce_eager"]  # vLLM compiles a sampler's part anyway
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sampling = SamplingParams(
        temperature=0, max_tokens=length, ignore_eos=True, logprobs=1, detokenize=False
    )
    found = []
    for output in LLM(**options, skip_tokenizer_init=True).generate(
        [{"prompt_token_ids": ids} for ids in prompts], sampling
    ):
        tokens, rows = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        found.append([tokens, [row[each].logprob for row, each in zip(rows, tokens, strict=True)]])
    Path(answer).write_text(json.dumps(found))


def main() -> None:
    """Fork an engine per line of standard input; say "ended" when it did."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some releases of vLLM log to standard output
    for name in ("vllm", *IMPORTED):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    context = multiprocessing.get_context

    def forked(method: str | None = None) -> Any:
        return context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forked
    registry = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda call: call()  # which imports a class to look at it
    for line in sys.stdin:
        process = context("fork").Process(target=answer_and_end, args=json.loads(line))
        process.start()
        process.join()
        print("ended", file=replies, flush=True)


if __name__ == "__main__":
    main()
