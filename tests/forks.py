"""Processes of their own for tests, without the seconds that importing takes.

They are forks of one server process (multiprocessing's) that has imported truedepth, PyTorch and
transformers and nothing else has happened in. What is tested about starting an interpreter itself
does not go here: it needs `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

TIMEOUT = 600
COMMAND = "from truedepth.cli.app import main; main()"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("truedepth.cli.app", "truedepth.conversion", "truedepth.inspection", "truedepth.demo"),
        *("truedepth.depth_study.run", "truedepth.engines.gguf.export", "truedepth.healing.run"),
        *("truedepth.planning.search", "truedepth.report.study_report"),
        "transformers.models.llama.modeling_llama",
    ]
)


def truedepth(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, with nothing to type into it."""
    return python(COMMAND, *words, cwd=cwd)


def python(
    code: str, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `python -c code arguments` in `cwd`; gives its exit code and what it wrote."""
    with begun(code, *arguments, cwd=cwd) as running:
        code_ = running.wait()
        return subprocess.CompletedProcess(running.line, code_, running.stdout, running.stderr)


@dataclass(frozen=True)
class Running:
    """A process that may still be at work."""

    line: list[str]
    process: BaseProcess
    directory: Path

    @property
    def stdout(self) -> str:
        """What it has written until now."""
        return (self.directory / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """Likewise."""
        return (self.directory / "stderr").read_text()

    def wait_for(self, line: str, times: int = 1) -> None:
        """Until it has written a line so often."""
        while self.stdout.splitlines().count(line) < times:
            assert self.process.is_alive(), self.stderr
            time.sleep(0.005)

    def kill(self) -> None:
        """With SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def wait(self) -> int:
        """Its exit code, or the signal that ended it as a negative number."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, f"still at work after {TIMEOUT} s: {self.stderr}"
        return self.process.exitcode


@contextmanager
def begun(code: str, *arguments: object, cwd: Path | None = None) -> Iterator[Running]:
    """As `python`, but goes on at once; killed at the end where it is still at work."""
    with tempfile.TemporaryDirectory() as directory:
        line = ["truedepth" if code is COMMAND else "-c", *map(str, arguments)]
        given = (code, line, str(cwd or Path.cwd()), directory, dict(os.environ))
        process = _CONTEXT.Process(target=_run, args=given)
        for name in ("stdout", "stderr"):
            (Path(directory) / name).touch()
        process.start()
        try:
            yield Running(line, process, Path(directory))
        finally:
            process.kill()
            process.join()


def _run(
    code: str, line: Sequence[str], cwd: str, directory: str, environment: dict[str, str]
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(directory) / name, os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    sys.argv = list(line)
    exec(code, {"__name__": "__main__"})
