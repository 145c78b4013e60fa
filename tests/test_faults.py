"""What goes wrong outside: full and read-only disks, changing sources, kills, two runs at once."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forks
import truedepth as td
from truedepth.cli import app as cli
from truedepth.sources.stamps import Stamps

KILL = "import kill; kill.main()"

TRAINED = ["--tokens", 1024, "--sequence-length", 32, "--batch-size", 4, "--micro-batch-size", 4]
HEALED = [*TRAINED, "--eval-every", 4, "--validation", 4]

COMMANDS = {
    "convert": "convert MODEL OUT --layers 1-4",
    "calibrate": "convert MODEL OUT --layers 1-4 --calibrate --text TEXT --tokens 1024",
    "study": "study MODEL -o OUT --text TEXT --window 32 --windows 2 --only parallel",
    "heal": "heal CKPT OUT --teacher MODEL --text TEXT " + " ".join(map(str, HEALED)),
    "heal, predictions kept": "heal CKPT OUT --teacher MODEL --text TEXT --keep-predictions 8 "
    + " ".join(map(str, HEALED)),
    "export": "export CKPT OUT",
}


@pytest.fixture
def places(make_model, prose, tmp_path):
    """A model of the test's own, what it was converted to, a text, and a place for the output."""
    shutil.copytree(make_model(), tmp_path / "model")
    td.convert(make_model(), tmp_path / "ckpt", td.Plan.span(6, 1, 4))
    return {
        "MODEL": tmp_path / "model",
        "CKPT": tmp_path / "ckpt",
        "TEXT": prose,
        "OUT": tmp_path / "place" / "out.gguf",  # a directory may be named so, too
    }


@pytest.fixture
def command(places, monkeypatch, capsys):
    """`command("convert", OUT=…)`: its exit code and what it said, which is one line."""

    def run(name: str, **others: Path) -> tuple[int, str]:
        words = [str((places | others).get(word, word)) for word in COMMANDS[name].split()]
        monkeypatch.setattr(sys, "argv", ["truedepth", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = [line for line in capsys.readouterr().err.splitlines() if line[:10] == "truedepth:"]
        assert len(said) == bool(ended.value.code)
        return ended.value.code or 0, "".join(said)

    return run


def contents(out):
    """Every file; of a study its figures."""
    if out.is_file():
        return out.read_bytes()
    found = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if Path("measurements.jsonl") in found:
        figures = json.loads(found.get(Path("study.json"), "{}"))
        return {name: each for name, each in figures.items() if name != "command"}
    return found


def nothing_but(out, whole):
    """There is no output; a study, made in place, has no figures yet, or all."""
    places = [out.parent, out] if out.is_dir() else [out.parent]
    partial = [file for place in places for file in place.glob(".*.partial")]
    return not partial and (not out.exists() or (out.is_dir() and contents(out) in ({}, whole)))


def left_beside(out):
    kept = [f".{out.name}.{what}" for what in ("calibration", "healing")]
    return {path.name for path in out.parent.iterdir()} - {out.name, *kept}


def largest_file(out):
    return max(path.stat().st_size for path in (out.rglob("*") if out.is_dir() else [out]))


class SmallDisk:
    """A tmpfs that can be filled; where mounting is not allowed, a limit on the size of files."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def room(self, size: int):
        """Only so many bytes."""
        if self.mounted:
            free = shutil.disk_usage(self.place).free
            ballast = self.place / "ballast"
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - size))
            yield ("No space left on device",)
            ballast.unlink()
        else:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                yield "File too large", "unexpected pos"  # PyTorch says the latter of any failure
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def end(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    disk = SmallDisk(tmp_path / "small")
    yield disk
    disk.end()


@pytest.fixture
def limited_files(tmp_path, monkeypatch):
    """As on a machine that does not let one mount."""
    monkeypatch.setenv("PATH", "/nothing")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], returncode=1)
    )
    return SmallDisk(tmp_path / "small")


def fill_and_go_on(command, places, disk, name):
    assert command(name) == (0, "")
    whole, largest = contents(places["OUT"]), largest_file(places["OUT"])
    out = disk.place / "out.gguf"
    for room in (0, 1 << 13, largest // 4, largest * 3 // 4):
        with disk.room(room) as words:
            code, said = command(name, OUT=out)
        assert (code, any(each in said for each in words)) == (1, True), said
        assert nothing_but(out, whole)
    assert command(name, OUT=out) == (0, "")
    assert contents(out) == whole
    assert {path.name for path in disk.place.iterdir()} == {out.name}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(command, places, small_disk, name):
    """One sentence, nothing half-written; with room the same command gives what it should."""
    fill_and_go_on(command, places, small_disk, name)


def test_a_full_disk_where_nothing_can_be_mounted(command, places, limited_files):
    fill_and_go_on(command, places, limited_files, "convert")


def test_a_full_workspace(places, small_disk, prose):
    options = td.Calibration([prose], tokens=1024, workspace=small_disk.place)
    full = pytest.raises(td.TruedepthError, match=r"workspace .* cannot hold 1 MB more of states")
    with small_disk.room(1 << 16), full as caught:
        td.calibrate(places["MODEL"], places["OUT"], td.Plan.span(6, 1, 4), options)
    assert caught.value.exit_code == 1
    assert not places["OUT"].exists()
    td.calibrate(places["MODEL"], places["OUT"], td.Plan.span(6, 1, 4), options)
    assert left_beside(places["OUT"]) == set()


def read_only(place):
    """Root may write anywhere but on a disk that is mounted so."""
    options = "remount,ro,bind"
    mounts = (["mount", "--bind", place, place], ["mount", "-o", options, place])
    return all(subprocess.run(each, capture_output=True).returncode == 0 for each in mounts)


@pytest.fixture
def sealed():
    """`sealed(directory)` makes it read-only: by a mount, or by its mode, which root ignores."""
    done = []

    def seal(place: Path) -> bool:
        done.append(place)
        place.chmod(0o555)
        return read_only(place) or os.geteuid() != 0

    yield seal
    for place in done:
        while subprocess.run(["umount", place], capture_output=True).returncode == 0:
            pass
        place.chmod(0o755)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_is_read_only(command, places, sealed, name):
    place = places["OUT"].parent
    place.mkdir()
    if not sealed(place):
        place = Path("/sys")  # where root may not make files either
    before = list(place.iterdir())
    code, said = command(name, OUT=place / "out.gguf")
    assert code == 2
    assert "Cannot write to" in said
    assert "Read-only file system" in said or "ermi" in said  # Permission denied, not permitted
    assert list(place.iterdir()) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_sources_that_are_read_only(command, places, sealed, name):
    sealed(places["MODEL"])
    sealed(places["CKPT"])
    assert command(name) == (0, "")


def touch(file):
    os.utime(file, ns=(1, 1))


def grow(file):
    with file.open("ab") as opened:
        opened.write(b"\n")


def shrink(file):
    os.truncate(file, file.stat().st_size // 2)


def remove(file):
    file.unlink()


CHANGES = [("convert", change) for change in (touch, grow, shrink, remove)]
CHANGES += [(name, change) for name in COMMANDS if name != "convert" for change in (touch, shrink)]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_a_source_that_changes_while_it_is_read(command, places, monkeypatch, name, change):
    """Just before a look at it: the first, one in the middle, the last."""
    file = places["CKPT" if name == "export" else "MODEL"] / "model.safetensors"
    whole, check, looks = file.read_bytes(), Stamps.check, 0

    def change_at(number: int | None) -> None:
        def changing(self, *files):
            nonlocal looks
            looks += file in self._found
            if looks == number:
                change(file)
            check(self, *files)

        monkeypatch.setattr(Stamps, "check", changing)

    change_at(None)
    assert command(name) == (0, "")
    expected, count = contents(places["OUT"]), looks
    assert count > 5
    for number in (1, count // 2, count):
        out = places["OUT"].with_name(f"{number}.gguf")
        looks = 0
        change_at(number)
        code, said = command(name, OUT=out)
        assert (code, f"{file} changed while it was read" in said) == (1, True), said
        assert nothing_but(out, {})
        file.write_bytes(whole)
    monkeypatch.setattr(Stamps, "check", check)
    assert command(name, OUT=out) == (0, "")
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_small_files_that_change_count_too(command, places, monkeypatch, name):
    check = Stamps.check

    def changing(self, *files):
        if not files:
            grow(places["MODEL"] / name)
        check(self, *files)

    monkeypatch.setattr(Stamps, "check", changing)
    code, said = command("convert")
    assert (code, f"{name} changed while it was read" in said) == (1, True), said
    assert not list(places["OUT"].parent.iterdir())


CUT_SHORT = """
import os, sys, torch, truedepth as td
from truedepth.sources.stamps import Stamps
def late(self, *files):
    check(self, *files)
    os.truncate(sys.argv[1] + "/model.safetensors", 4096)
check, Stamps.check = Stamps.check, late
try:
    td.convert(*sys.argv[1:3], td.Plan(6, [[1, 2]]), dtype=getattr(torch, sys.argv[3], None))
except td.TruedepthError as error:
    sys.exit(f"truedepth: {error}")
"""


@pytest.mark.parametrize(
    ("dtype", "code"), [("as it is", 1), ("bfloat16", -signal.SIGBUS)], ids=["write", "compute"]
)
def test_a_source_cut_short_between_look_and_read(command, places, dtype, code):
    """Where what is lost is written as it is, it is an error; where it is computed with, the system
    ends the process. Nothing of the output is there, and the next run is as any other.
    """
    file = places["MODEL"] / "model.safetensors"
    whole = file.read_bytes()
    done = forks.python(CUT_SHORT, places["MODEL"], places["OUT"], dtype)
    assert done.returncode == code
    if code == 1:
        assert f"{file} changed while it was read" in done.stderr
    assert not places["OUT"].exists()
    file.write_bytes(whole)
    assert command("convert") == (0, "")
    assert left_beside(places["OUT"]) == set()


def script(code, *arguments):
    """With the benchmarks at hand, in one process that forks; gives its JSON."""
    done = forks.python(code, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_few_kills():
    found = script(KILL, "--kills", 12, "--only", "convert", "--only", "convert --force")
    assert found["kills"] >= 12
    assert found["violations"] == 0


@pytest.mark.slow
def test_kills():
    found = script(KILL, "--kills", 70, "--seed", 1)
    assert {name for name, case in found["cases"].items() if case["kills"] >= 10} >= {
        *("convert", "calibrate", "study", "heal", "export"),
        *("convert --force", "calibrate --force"),
    }
    assert found["violations"] == 0


TWO_RUNS = """
import fcntl, json, os, signal, tempfile, time
from pathlib import Path
import kill

flock = fcntl.flock
def holding(lock):
    def held(descriptor, how):
        flock(descriptor, how)
        lock.touch()
        time.sleep(600)
    fcntl.flock = held

found = {}
with kill.bench(0, None) as bench:
    for name, case in kill.CASES.items():
        if case.forced:
            continue
        place = bench.root / name.replace(" ", "")
        place.mkdir()
        out, lock = place / case.name, bench.root / f"{name} is locked"
        arguments = bench.arguments(case.arguments, out)
        first = kill.run(lambda: (holding(lock), kill.command(arguments)), bench.root / "log")
        while not lock.exists():
            assert os.waitpid(first, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        second, _ = kill.wait(kill.run(lambda: kill.command(arguments), bench.root / "log"), 60)
        said = (bench.root / "log").read_text()
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        third, _ = kill.wait(kill.run(lambda: kill.command(arguments), bench.root / "log"), 60)
        found[name] = [second, said, third, kill.left_beside(out)]
print(json.dumps(found))
"""


def test_two_runs_on_one_output():
    """The second process is refused in one sentence; when the first is dead, the third goes on."""
    found = script(TWO_RUNS)
    assert found.keys() >= {"convert", "calibrate", "study", "heal", "export"}
    for name, (second, said, third, left) in found.items():
        assert (second, third, left) == (2, 0, []), name
        assert len(said.splitlines()) == 1
        assert "being written by another run" in said or "Another run is using" in said
