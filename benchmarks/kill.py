"""Runs killed (SIGKILL) at random points: never a wrong output, always a whole one in the end.

Small random models; `convert`, `convert --calibrate`, `study`, `heal` and `export`, and the first
two with `--force` over an older output. A run is killed after a random share of the time that it
takes, or at one of its file operations drawn at random, up to three times; then it may finish.
After every kill the output must be absent, or equal, file by file, to that of a run that was not
killed; with `--force` it must be the older output or that one. A study is written in place: the
same holds for each of its files except the measurements. The run that finishes must give the same
bytes and leave nothing next to them, without `--force` or cleaning.

    python benchmarks/kill.py --kills 150 --json docs/results/kill.json

Modules are imported once; runs are forks of this process.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # forks have one thread

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rows import parser_of, report
from truedepth import conversion
from truedepth.cli import app as cli
from truedepth.depth_study import run as depth_study
from truedepth.engines.gguf import export as gguf
from truedepth.healing import run as healing
from truedepth.report import study_report

IMPORTED = (conversion, depth_study, healing, gguf, study_report)  # not once in every run

TIMEOUT = 300
"""Seconds after which a run that should have finished is a failure."""

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fcntl.flock", "os.listdir")
"""Audit events of Python that a run can be killed at."""

WORDS = ["the", "cat", "sat", "on", "mat", "and", "then", "hat", "a", "dog", "saw"]

Files = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """A command to kill."""

    arguments: list[str]
    """MODEL, CKPT, TEXT and OUT stand for paths."""

    forced: bool = False
    """Whether it replaces an older output."""

    name: str = "out"
    """Name of the output."""

    in_place: bool = False
    """Whether the output is a directory that is filled during the run."""


CALIBRATE = [*("--calibrate", "--text", "TEXT", "--tokens", "1024")]
CASES = {
    "convert": Case(["convert", "MODEL", "OUT", "--layers", "1-4", "--shard-size", "100KB"]),
    "calibrate": Case(["convert", "MODEL", "OUT", "--layers", "0-5", *CALIBRATE]),
    "study": Case(
        ["study", "MODEL", "-o", "OUT", "--text", "TEXT", "--window", "32", "--windows", "2"],
        in_place=True,
    ),
    "heal": Case(
        [
            *("heal", "CKPT", "OUT", "--teacher", "MODEL", "--text", "TEXT", "--tokens", "2048"),
            *("--sequence-length", "32", "--batch-size", "4", "--micro-batch-size", "4"),
            *("--eval-every", "4", "--validation", "4"),
        ]
    ),
    "export": Case(["export", "CKPT", "OUT"], name="out.gguf"),
    "convert --force": Case(["convert", "MODEL", "OUT", "--layers", "1-4", "--force"], forced=True),
    "calibrate --force": Case(
        ["convert", "MODEL", "OUT", "--layers", "0-5", *CALIBRATE, "--force"], forced=True
    ),
}


@dataclass
class Outcome:
    """What happened to the runs of one case."""

    kills: int = 0
    by_time: int = 0
    by_operation: int = 0
    histories: int = 0
    """Runs that were killed one to three times and then finished."""

    finished_before: int = 0
    """Runs that had ended before they could be killed; they do not count as kills."""

    found: Counter[str] = field(default_factory=Counter)
    """What was in the output's place after each kill, counted."""

    beside: Counter[str] = field(default_factory=Counter)
    """What killed runs left next to the output, for the next run, counted."""

    ended: Counter[str] = field(default_factory=Counter)
    """How the last run of a history ended."""

    violations: list[str] = field(default_factory=list)


class Bench:
    """A directory with models, a text, and the outputs of runs that were not killed."""

    def __init__(self, root: Path, seed: int) -> None:
        """Make models, text and outputs."""
        self.root, self._random = root, random.Random(seed)
        self.paths = {name: root / name for name in ("MODEL", "CKPT", "TEXT")}
        self.paths["TEXT"] = root / "text.txt"
        words = (self._random.choice(WORDS) for _ in range(3000))
        self.paths["TEXT"].write_text(" ".join(words))
        self._expect(0, lambda: write_model(self.paths["MODEL"]), "model")
        convert = ["convert", "MODEL", "CKPT", "--layers", "1-4"]
        self._expect(0, lambda: command(self.arguments(convert, root)), "CKPT")

    def arguments(self, case: list[str], out: Path) -> list[str]:
        """A case's arguments with actual paths."""
        paths = {**self.paths, "OUT": out}
        return [str(paths.get(part, part)) for part in case]

    def _expect(self, code: int, act: Callable[[], object], what: str) -> float:
        start = time.monotonic()
        log = self.root / "log"
        ended, _ = wait(run(act, log), TIMEOUT)
        if ended != code:
            raise SystemExit(f"{what}: ended with {ended}, not {code}: {log.read_text()[-2000:]}")
        return time.monotonic() - start

    def measure(self, name: str, kills: int) -> Outcome:
        """Kill a case's command `kills` times."""
        case, outcome = CASES[name], Outcome()
        place = self.root / name.replace(" ", "")
        place.mkdir()
        out = place / case.name
        arguments = self.arguments(case.arguments, out)
        old = self.older(out) if case.forced else None
        counted = self.root / "operations"
        counts = lambda: self._counted(arguments, place, counted)  # noqa: E731
        self._expect(0, counts, name)
        operations, new = int(counted.read_text()), files(out)
        if hidden := left_beside(out):
            raise SystemExit(f"{name} leaves {hidden} also where nobody kills it")
        self._clean(place, old, out)
        seconds = self._expect(0, lambda: command(arguments), name)
        if files(out) != new:
            raise SystemExit(f"{name} gives other bytes each time: {differing(files(out), new)}")
        print(f"{name}: {seconds:.2f} s, {operations} file operations", file=sys.stderr)
        while outcome.kills < kills:
            self._clean(place, old, out)
            self._history(case, arguments, out, (seconds, operations), (old, new), outcome)
        return outcome

    def older(self, out: Path) -> Files:
        """Write an older output, with another plan."""
        convert = ["convert", "MODEL", "OUT", "--layers", "2-3"]
        self._expect(0, lambda: command(self.arguments(convert, out)), "older output")
        shutil.copytree(out, self.root / "old", dirs_exist_ok=True)
        return files(out)

    def _clean(self, place: Path, old: Files | None, out: Path) -> None:
        shutil.rmtree(place)
        place.mkdir()
        if old is not None:
            shutil.copytree(self.root / "old", out)

    def _counted(self, arguments: list[str], place: Path, counted: Path) -> None:
        seen = 0

        def count() -> None:
            nonlocal seen
            seen += 1

        on_operations(place, count)
        try:
            command(arguments)
        finally:
            counted.write_text(str(seen))

    def _history(
        self,
        case: Case,
        arguments: list[str],
        out: Path,
        scale: tuple[float, int],
        known: tuple[Files | None, Files],
        outcome: Outcome,
    ) -> None:
        old, new = known
        killed: list[str] = []
        state = "none"
        for _ in range(self._random.choice([1, 1, 2, 3])):
            share = self._random.random()
            by_time = self._random.random() < 0.5
            if by_time:
                code = wait(run(lambda: command(arguments), self.root / "log"), share * scale[0])[0]
            else:
                at = 1 + int(share * scale[1])
                doomed = lambda at=at: dying(arguments, out.parent, at)  # noqa: E731
                code = wait(run(doomed, self.root / "log"), TIMEOUT)[0]
            if code != -signal.SIGKILL:  # ended before
                outcome.finished_before += 1
                if code and not (code == 2 and state == "new"):  # refused: it is there
                    outcome.violations.append(f"killed at {killed}: then ended with {code}")
                break
            outcome.kills += 1
            outcome.by_time += by_time
            outcome.by_operation += not by_time
            how = f"{share:.4f} of the {'time' if by_time else 'operations'}"
            killed.append(how)
            state = _state(case, out, old, new)
            outcome.found[state] += 1
            outcome.beside.update(left_beside(out))
            if state.startswith("wrong"):
                outcome.violations.append(f"killed at {killed}: {state}")
        outcome.histories += 1
        before = _state(case, out, old, new)
        code, _ = wait(run(lambda: command(arguments), self.root / "log"), TIMEOUT)
        said = (self.root / "log").read_text().strip()
        if code == 2 and "already exists; give --force" in said and before == "new":
            outcome.ended["refused: it is there"] += 1
        elif code == 0:
            outcome.ended["completed"] += 1
        else:
            outcome.violations.append(f"killed at {killed}: then ended with {code}: {said[-500:]}")
        if files(out) != new:
            which = differing(files(out), new)
            outcome.violations.append(f"killed at {killed}: other bytes in {which}")
        if hidden := left_beside(out):
            outcome.violations.append(f"killed at {killed}: {hidden} is left")


def _state(case: Case, out: Path, old: Files | None, new: Files) -> str:
    """What is in the output's place."""
    if not out.exists():
        return "none" if old is None else "wrong: neither old nor new"
    found = files(out)
    if case.in_place:
        parts = {name: data for name, data in found.items() if name != "measurements.jsonl"}
        visible = {name: data for name, data in parts.items() if not name.startswith(".")}
        if wrong := [name for name, data in visible.items() if new.get(name) != data]:
            return f"wrong: {wrong}"
        return "new" if found == new else "begun"
    if found == new:
        return "new"
    if old is not None and found == old:
        return "old"
    return f"wrong: {differing(found, new)}"


def left_beside(out: Path) -> list[str]:
    """Hidden siblings of an output, and hidden files in it."""
    places = [out.parent, out] if out.is_dir() else [out.parent]
    return sorted(p.name for place in places for p in place.iterdir() if p.name.startswith("."))


def files(directory: Path) -> Files:
    """The bytes of all files of a directory, or of one file."""
    if directory.is_file():
        return {directory.name: directory.read_bytes()}
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def differing(one: Files, other: Files) -> list[str]:
    """Names of the files that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def run(act: Callable[[], object], log: Path) -> int:
    """Run a function in a fork; returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        act()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> tuple[int, float]:
    """Wait for a process, and kill it after the timeout; returns its exit code and seconds."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        time.sleep(min(0.002, seconds))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def command(arguments: list[str]) -> None:
    """Run a truedepth command in this process."""
    sys.argv = ["truedepth", *arguments]
    cli.main()


def dying(arguments: list[str], place: Path, at: int) -> None:
    """Run a command that is killed just before its file operation number `at`."""
    seen = 0

    def die() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    on_operations(place, die)
    command(arguments)


def on_operations(place: Path, act: Callable[[], object]) -> None:
    """Call a function before each file operation, and before each `open` in a directory."""

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in OPERATIONS and (event != "open" or str(details[0]).startswith(str(place))):
            act()

    sys.addaudithook(hook)


def write_model(directory: Path) -> None:
    """A random Llama of six layers with a tokenizer of bytes."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<end>", *alphabet])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(directory)


@contextmanager
def bench(seed: int, directory: Path | None) -> Iterator[Bench]:
    """A bench in a temporary directory."""
    with tempfile.TemporaryDirectory(dir=directory) as root:
        yield Bench(Path(root), seed)


def main() -> None:
    """Kill runs; print and write what was found."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("--kills", type=int, default=60, help="over all cases, shared equally")
    parser.add_argument(
        "--only", action="append", choices=CASES, help="only this case; repeat for more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="a directory on the file system to test")
    arguments = parser.parse_args()
    names = arguments.only or list(CASES)
    start = time.monotonic()
    with bench(arguments.seed, arguments.directory) as made:
        outcomes = {name: made.measure(name, -(-arguments.kills // len(names))) for name in names}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": arguments.seed,
        "kills": sum(outcome.kills for outcome in outcomes.values()),
        "violations": sum(len(outcome.violations) for outcome in outcomes.values()),
        "seconds": round(time.monotonic() - start, 1),
        "cases": {
            name: {**vars(outcome), "arguments": CASES[name].arguments}
            for name, outcome in outcomes.items()
        },
    }
    report(result, arguments.json)
    sys.exit(1 if result["violations"] else 0)


if __name__ == "__main__":
    main()
