"""Output that is either whole or not there.

Everything is written to a hidden sibling directory, which is renamed, or the file in it, when it is
complete. The sibling is locked while it is written, so that a second run on the same output is
refused, and what a killed run left behind is recognised and removed by the next.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from truedepth.errors import TruedepthError

USED_UP = "used-up"
"""A file in a directory that a run kept beside its output: all of it is in the output."""


def beside(out: Path, what: str) -> Path:
    """The hidden sibling of an output that holds its unfinished `calibration`, `healing`, …"""
    return out.with_name(f".{out.name}.{what}")


def check_output(out: Path, force: bool = False) -> None:
    """Refuse at once what writing it would refuse.

    Raises:
        TruedepthError: `out` exists and `force` is not given.
    """
    if os.path.lexists(out) and not force:
        _clear(out.resolve())
        raise TruedepthError(f"{out} exists already; give --force to replace it.")


@contextmanager
def atomic_directory(out: Path, force: bool = False, kept: Path | None = None) -> Iterator[Path]:
    """A directory to write to, which becomes `out` when the block ends without an exception.

    With `force` an existing `out` is replaced at that moment and not before.

    Args:
        out: Where to.
        force: Replace it if it exists.
        kept: A directory that the run kept beside it, which is used up at that moment.

    Raises:
        TruedepthError: `out` exists, is being written by another run, or cannot be written. An
            OSError of the block, such as a full disk, becomes one too.
    """
    with _partial(out, force, lambda partial: partial, kept) as partial:
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
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends without an exception.

    For the files of a directory that has its lock already, and is gone on with after a fault.

    Raises:
        TruedepthError: It cannot be written, as on a full disk.
    """
    partial = beside(path, "partial")
    try:
        yield partial
        _sync_one(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors' own for a full disk
            reason = getattr(error, "strerror", None) or str(error)
            raise TruedepthError(
                f"Writing {path} failed: {reason}; with that put right the same command goes on"
                " from what was written before.",
                exit_code=1,
            ) from error
        raise


@contextmanager
def _partial(
    out: Path, force: bool, written: Callable[[Path], Path], kept: Path | None = None
) -> Iterator[Path]:
    """A hidden directory to write in; what is `written` there becomes `out`."""
    out = out.resolve()
    partial, replaced = beside(out, "partial"), beside(out, "replaced")
    busy = f"{out} is being written by another run."
    lock = locked_directory(partial, busy=busy, where=out)
    try:
        if replaced.exists() and not out.exists():  # a run was killed between its two renames
            replaced.rename(out)
        check_output(out, force)
        empty(partial)
        yield partial
        _sync(written(partial))
        check_output(out, force)  # it may have appeared meanwhile
        if kept is not None and kept.is_dir():
            (kept / USED_UP).touch()
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


def locked_directory(directory: Path, *, busy: str, where: Path | None = None) -> int:
    """Make a directory and lock it; the lock goes with the process, however it ends.

    Args:
        directory: Made where it is not there.
        busy: What to say if another run has locked it.
        where: What to name where it cannot be made; by default the directory.

    Returns:
        The lock, to be closed.

    Raises:
        TruedepthError: It is locked, or cannot be made.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        while True:
            directory.mkdir(exist_ok=True)
            lock = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_locked(directory, lock):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
    except BlockingIOError as error:
        raise TruedepthError(busy) from error
    except OSError as error:
        raise TruedepthError(
            f"Cannot write to {where or directory}: {error.strerror}.",
            exit_code=1 if error.errno == errno.ENOSPC else 2,
        ) from error


def _clear(out: Path) -> None:
    """Remove what is left beside a whole output by a run that was killed just after writing it."""
    kept = [beside(out, what) for what in ("calibration", "healing")]
    used_up = [place for place in kept if (place / USED_UP).exists() or _is_empty(place)]
    for place in (beside(out, "partial"), beside(out, "replaced"), *used_up):
        if place.is_dir():
            with suppress(TruedepthError):  # another run is at work there, or it cannot be removed
                lock = locked_directory(place, busy="")
                discard(place)
                os.close(lock)
        else:
            with suppress(OSError):
                place.unlink()


def discard(directory: Path) -> None:
    """Remove a directory, the mark that it is used up last: a kill may fall in between."""
    with suppress(OSError):  # in the way of nothing
        for entry in sorted(directory.iterdir(), key=lambda entry: entry.name == USED_UP):
            _remove(entry)
        directory.rmdir()


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def empty(directory: Path) -> None:
    """Remove all that a directory holds."""
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
    """Put what is written in the place of `out`: in one step, or with `out` back if that fails."""
    if out.exists() and _swapped(written, out):
        replaced = written
    elif out.exists():
        _remove(replaced)
        out.rename(replaced)
        try:
            written.rename(out)
        except BaseException:
            replaced.rename(out)
            raise
    else:
        written.rename(out)
    _sync_one(out.parent)
    _remove(replaced)


def _swapped(one: Path, other: Path) -> bool:
    """Let two names change places in one step, where system and file system can (Linux, mostly)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    if renameat2 is None:
        return False
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_apart(source: Path, out: Path) -> None:
    """Neither may contain the other, also where the source is made of links."""
    links = list(source.iterdir()) if source.is_dir() else []
    for place in {source.resolve(), *(link.resolve() for link in links)}:
        if out == place or out in place.parents:
            raise TruedepthError(f"The output {out} contains the source {place}; choose another.")
    if source.is_dir() and source.resolve() in out.parents:
        raise TruedepthError(f"The output {out} is inside the source {source}; choose another.")
