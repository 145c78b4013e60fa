"""Output that is either whole or not there.

Everything is written to a hidden sibling directory, which is renamed, or the file in it, when it is
complete. The sibling is locked while it is written, so that a second run on the same output is
refused, and what a killed run left behind is recognised and removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from truedepth.errors import TruedepthError


def check_output(out: Path, force: bool = False) -> None:
    """Refuse at once what writing it would refuse.

    Raises:
        TruedepthError: `out` exists and `force` is not given.
    """
    if os.path.lexists(out) and not force:
        raise TruedepthError(f"{out} exists already; give --force to replace it.")


@contextmanager
def atomic_directory(out: Path, force: bool = False) -> Iterator[Path]:
    """A directory to write to, which becomes `out` when the block ends without an exception.

    With `force` an existing `out` is replaced at that moment and not before.

    Raises:
        TruedepthError: `out` exists, is being written by another run, or cannot be written. An
            OSError of the block, such as a full disk, becomes one too.
    """
    with _partial(out, force, lambda partial: partial) as partial:
        yield partial


@contextmanager
def atomic_file(out: Path, force: bool = False) -> Iterator[Path]:
    """A file to write, likewise. What the block leaves beside it is removed.

    Raises:
        TruedepthError: As of a directory.
    """
    name = out.resolve().name
    with _partial(out, force, lambda partial: partial / name) as partial:
        yield partial / name


@contextmanager
def _partial(out: Path, force: bool, written: Callable[[Path], Path]) -> Iterator[Path]:
    """A hidden directory to write in; what is `written` there becomes `out`."""
    out = out.resolve()
    partial, replaced = (out.with_name(f".{out.name}.{what}") for what in ("partial", "replaced"))
    lock = _locked_directory(partial, out)
    try:
        if replaced.exists() and not out.exists():  # a run was killed between its two renames
            replaced.rename(out)
        check_output(out, force)
        _empty(partial)
        yield partial
        _sync(written(partial))
        check_output(out, force)  # it may have appeared meanwhile
        _exchange(written(partial), out, replaced)
    except BaseException as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise TruedepthError(
                f"Writing {out} failed: {reason}; nothing of it was kept.", exit_code=1
            ) from error
        raise
    finally:
        if _is_locked(partial, lock):  # not renamed
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _is_locked(partial: Path, lock: int) -> bool:
    """Between opening and locking its owner may have renamed or removed it; so may we since."""
    return partial.exists() and partial.stat().st_ino == os.fstat(lock).st_ino


def _locked_directory(partial: Path, out: Path) -> int:
    """Make the directory and lock it; the lock goes with the process, however it ends."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_locked(partial, lock):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
    except BlockingIOError as error:
        raise TruedepthError(f"{out} is being written by another run.") from error
    except OSError as error:
        raise TruedepthError(f"Cannot write to {out}: {error.strerror}.") from error


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        _remove(entry)


def _sync(written: Path) -> None:
    """Contents must reach the disk before the rename that vouches for them."""
    for path in (*written.rglob("*"), written):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(written: Path, out: Path, replaced: Path) -> None:
    """Put what is written in the place of `out`, which is back if that fails."""
    if out.exists():
        _remove(replaced)
        out.rename(replaced)
    try:
        written.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    _sync_one(out.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
