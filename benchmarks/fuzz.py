"""Feeds damaged and made-up files to the readers of model files (docs/reliability.md).

    python benchmarks/fuzz.py --json docs/results/fuzz.json

Every input must open, and then its tensors are read, or raise TruedepthError. Anything else is
recorded: another exception, more than 5 seconds of computing, 1 GiB more memory than before, or a
process that dies. Readers run in separate processes, which may die.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNTS = {  # 110,000
    "gguf": 25_000,
    "safetensors": 30_000,
    "plan": 25_000,
    "config": 15_000,
    "index": 10_000,
    "pickle": 5_000,
}
SECONDS = 5  # of computing time per input
SILENCE = 300.0  # seconds by the clock: the machine may be busy with other work
MEMORY = 1 << 30


def reader_of(name: str, directory: Path) -> Callable[[bytes], None]:
    """The function that reads an input of this kind."""
    from safetensors.torch import save_file

    from fuzz_inputs import CONFIG, state
    from truedepth import Plan, open_source
    from truedepth.inspection import inspect_model

    def touch(source: Any) -> None:
        for tensor in source.tensors.values():
            rows = tensor.shape[0] if tensor.shape else 1
            for start in {0, max(0, rows - 2)}:
                tensor.rows(start, min(start + 2, rows)).float().sum().item()

    def in_directory(
        file: str, act: Callable[[Any], object], **options: bool
    ) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            (directory / file).write_bytes(data)
            act(open_source(directory, **options))

        return read

    def plan(data: bytes) -> None:
        (directory / "plan.yaml").write_bytes(data)
        found = Plan.from_yaml(directory / "plan.yaml")
        str(found), found.to_dict()

    def gguf(data: bytes) -> None:
        (directory / "model.gguf").write_bytes(data)
        touch(open_source(directory / "model.gguf"))

    if name in ("plan", "gguf"):
        return plan if name == "plan" else gguf
    (directory / "config.json").write_text(json.dumps(CONFIG))
    if name == "config":
        return in_directory("config.json", inspect_model)
    if name == "safetensors":
        return in_directory("model.safetensors", touch)
    if name == "pickle":
        return in_directory("pytorch_model.bin", touch, allow_pickle=True)
    save_file(state(), directory / "model-1.safetensors")
    return in_directory("model.safetensors.index.json", touch)


def worker(name: str, seed: int, first: int, last: int, directory: Path) -> None:
    """Read inputs first to last - 1; the outcome of each is a line of the file `progress`."""
    from fuzz_inputs import Inputs
    from truedepth import TruedepthError
    from truedepth.runtime.loading import load  # noqa: F401  imported before memory is counted

    read, inputs = reader_of(name, directory), Inputs(name, seed)

    class TooSlowError(BaseException):
        pass

    def stop(*_: object) -> None:
        raise TooSlowError

    for data in inputs.valid[:1]:
        read(data)
    signal.signal(signal.SIGPROF, stop)
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (directory / "progress").open("w", buffering=1) as progress:
        for number in range(first, last):
            data = inputs[number]
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(data)
                outcome = "opened"
            except TruedepthError:
                outcome = "refused"
            except TooSlowError:
                outcome = "hang"
            except BaseException as error:  # MemoryError too, and what Rust panics with
                outcome = f"{type(error).__name__}: {str(error)[:120]}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            taken = time.process_time() - began
            progress.write(json.dumps([number, outcome, taken]) + "\n")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        progress.write(json.dumps([last, "end", grown * 1024]) + "\n")


def fuzz(name: str, count: int, seed: int) -> dict[str, Any]:
    """Feed a reader all its inputs: how many opened, how many were refused, what else happened."""
    from fuzz_inputs import Inputs

    outcomes: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    slowest, grown, done, began = 0.0, 0, 0, time.monotonic()
    while done < count:
        directory = Path(tempfile.mkdtemp(prefix="fuzz"))
        command = [sys.executable, __file__, "--worker", name, str(seed), str(done), str(count)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
        environment |= {"OMP_NUM_THREADS": "1"}
        with (directory / "stderr").open("w") as said:
            process = subprocess.Popen([*command, str(directory)], stderr=said, env=environment)
        code, silent = None, 0.0
        progress, size = directory / "progress", -1
        while (code := process.poll()) is None and silent < SILENCE:
            time.sleep(0.2)
            now = progress.stat().st_size if progress.exists() else -1
            silent, size = (silent + 0.2 if now == size >= 0 else 0, now)
        process.kill()
        process.wait()
        lines = []
        if progress.exists():
            whole = progress.read_text().splitlines()
            lines = [json.loads(line) for line in whole if line[-1:] == "]"]
        for number, outcome, value in lines:
            if outcome == "end":
                grown = max(grown, value)
                continue
            slowest, done = max(slowest, value), number + 1
            ok = outcome in ("opened", "refused")
            outcomes[outcome if ok else "wrong"] += 1
            if not ok:
                wrong.append({"input": number, "outcome": outcome})
        if done < count or code:
            said_last = (directory / "stderr").read_text()[-300:]
            if done == 0 and not lines:
                raise SystemExit(f"The {name} worker did not begin: {said_last}")
            what = "killed in silence" if code is None else f"died with {code}"
            wrong.append({"input": done, "outcome": f"{what}: {said_last}"})
            outcomes["wrong"] += 1
            done += 1
        shutil.rmtree(directory)
    inputs = Inputs(name, seed)
    for each in wrong[:3]:
        each["begins"] = repr(inputs[each["input"]][:200])
    return {
        "inputs": count,
        **{kind: outcomes[kind] for kind in ("opened", "refused", "wrong")},
        "slowest_s": round(slowest, 3),
        "memory_grown_bytes": grown,
        "seconds": round(time.monotonic() - began, 1),
        "found": wrong[:50],
    }


def main() -> None:
    """Run the command line, or with --worker a part of the inputs."""
    if sys.argv[1:2] == ["--worker"]:
        name, seed, first, last, directory = sys.argv[2:]
        return worker(name, int(seed), int(first), int(last), Path(directory))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(COUNTS), action="append")
    parser.add_argument("--count", type=int, help="inputs of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if given.json and given.json.exists():  # of the other readers
        before = json.loads(given.json.read_text())
        found = before["readers"] if before["seed"] == given.seed else {}
    for name in given.only or COUNTS:
        found[name] = fuzz(name, given.count or COUNTS[name], given.seed)
        print(
            name, {key: value for key, value in found[name].items() if key != "found"}, flush=True
        )
        for each in found[name]["found"][:20]:
            print("   ", each, flush=True)
        if given.json:
            text = json.dumps({"seed": given.seed, "readers": found}, indent=2)
            given.json.write_text(text + "\n")
    sys.exit(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    main()
