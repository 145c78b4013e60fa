"""What a server's users get: tokens per second and latencies, a model against its base.

    python benchmarks/serving.py MODEL --against BASE --json PATH [--ranks 2]
        [--concurrency 1,2,4,8,16] [--input 128] [--output 64] [--repetitions 4] [--dtype bfloat16]

Two of vLLM's OpenAI-compatible servers run at once, one idle while the other is measured by the
client of `vllm bench serve`: random prompts over HTTP, streamed answers, so many requests under way
at any time. The models take turns (A B A B). Prefixes are not cached. On a CPU every rank has an
equal share of the cores, and the client shares them.

TTFT is the time to the first token, TPOT the time per token after it; both are medians over the
requests of a run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rows import machine, parser_of

MEASURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms")
"""What is kept of a run, as `vllm bench serve` names it."""

READY = 300
"""Seconds that a server may take to load a model and compile it."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serving(model: str | Path, ranks: int, log: Path, *options: str) -> Iterator[Server]:
    """Run vLLM's server, by the module that does what `vllm serve` does.

    Args:
        model: What vLLM loads; requests call it `model`.
        ranks: Tensor-parallel size.
        log: Where the server's output goes.
        options: More options of the server.

    Raises:
        RuntimeError: It ended before it was ready, or was not ready in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--tensor-parallel-size", str(ranks), *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + READY
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a worker that outlived the server


def measured(
    server: Server, tokenizer: str, concurrency: int, lengths: tuple[int, int]
) -> dict[str, float]:
    """One run of `vllm bench serve`: four requests for each of so many users."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = f"--model model --port {server.port} --ready-check-timeout-sec 0 --disable-tqdm"
    words += f" --max-concurrency {concurrency} --num-prompts {4 * concurrency} --ignore-eos"
    words += f" --random-input-len {lengths[0]} --random-output-len {lengths[1]} --temperature 0"
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        found = bench(parser.parse_args([*words.split(), "--tokenizer", tokenizer]))
    if found["completed"] != 4 * concurrency:
        raise RuntimeError(f"{found['failed']} requests failed: {server.log.read_text()[-4000:]}")
    return {name: found[name] for name in MEASURES}


def summary(runs: list[tuple[dict[str, float], ...]]) -> dict[str, Any]:
    """Medians of the base's and the model's runs, and the ratios that are above 1 for a gain."""
    row: dict[str, Any] = {}
    for name in MEASURES:
        base, model = ([run[name] for run in each] for each in runs)
        gains = [b / m for b, m in zip(base, model, strict=True)]
        ratio = median(base) / median(model)
        if name == "output_throughput":
            gains, ratio = [1 / each for each in gains], 1 / ratio
        row[name] = {
            "base": median(base),
            "model": median(model),
            "ratio": ratio,
            "range": [min(gains), max(gains)],
            "runs": {"base": base, "model": model},
        }
    return row


def main() -> None:
    """Serve both, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--against", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--concurrency", default="1,2,4,8,16")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    import vllm

    cores = sorted(os.sched_getaffinity(0))
    own = max(1, len(cores) // arguments.ranks)
    bound = [",".join(map(str, cores[i * own : (i + 1) * own])) for i in range(arguments.ranks)]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(bound))
    room = str(2 * (arguments.input + arguments.output))
    options = ("--no-enable-prefix-caching", "--max-model-len", room, "--dtype", arguments.dtype)
    lengths = (arguments.input, arguments.output)
    rows: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        with (
            serving(arguments.against, arguments.ranks, logs / "base", *options) as base,
            serving(arguments.model, arguments.ranks, logs / "model", *options) as model,
        ):
            for users in map(int, arguments.concurrency.split(",")):
                rounds = [
                    [measured(each, arguments.against, users, lengths) for each in (base, model)]
                    for _ in range(1 + arguments.repetitions)
                ]
                rows[users] = summary(list(zip(*rounds[1:], strict=True)))  # the first warms up
                for name, each in rows[users].items():
                    low, high = each["range"]
                    print(
                        f"{users:3} {name:18} {each['base']:8.1f} -> {each['model']:8.1f},"
                        f" {each['ratio']:.2f} ({low:.2f}-{high:.2f})",
                        flush=True,
                    )
    result = {"machine": machine(), "vllm": vllm.__version__, "input": lengths[0]}
    result |= {
        "output": lengths[1],
        "ranks": arguments.ranks,
        "dtype": arguments.dtype,
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
