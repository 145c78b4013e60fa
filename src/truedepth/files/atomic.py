"""Output that is either whole or absent.

Everything is written to a hidden sibling directory. When it is complete, this directory, or the
file in it, is renamed. The sibling is locked while it is written, so that a second run on the same
output is refused, and the next run recognises and removes what a killed run left behind.
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
"""Marks a directory that a run kept beside its output: all of its contents are in the output."""


def beside(out: Path, what: str) -> Path:
    """The hidden sibling `.NAME.WHAT` of an output: its `partial`, `calibration`, `healing`, …"""
    return out.with_name(f".{out.name}.{what}")


def check_output(out: Path, force: bool = False) -> None:
    """Refuse an output that exists, before any work is done for it.

    Raises:
        TruedepthError: `out` exists and `force` is false.
    """
    if os.path.lexists(out) and not force:
        _clear(out.resolve())
        raise TruedepthError(f"{out} already exists; give --force to replace it.")


@contextmanager
def atomic_directory(out: Path, force: bool = False, kept: Path | None = None) -> Iterator[Path]:
    """A directory to write to, which becomes `out` when the block ends without an exception.

    With `force` an existing `out` is replaced at that moment and not before.

    Args:
        out: The directory to make.
        force: Replace it if it exists.
        kept: A directory that the run kept beside it; it is marked as used up at that moment.

    Yields:
        The directory to write to.

    Raises:
        TruedepthError: `out` exists, is being written by another run, or cannot be written. An
            OSError in the block, such as a full disk, is raised as one too.
    """
    with _partial(out, force, lambda partial: partial, kept) as partial:
        yield partial


@contextmanager
def atomic_file(out: Path, force: bool = False) -> Iterator[Path]:
    """A file to write, which becomes `out` when the block ends without an exception.

    Anything else that the block leaves in its directory is removed.

    Raises:
        TruedepthError: See `atomic_directory`.
    """
    name = out.resolve().name
    with _partial(out, force, lambda partial: partial / name) as partial:
        yield partial / name


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which replaces `path` when the block ends without an exception.

    For files in a directory that is already locked and whose run can resume after a failure.

    Raises:
        TruedepthError: It cannot be written, for example because the disk is full.
    """
    partial = beside(path, "partial")
    try:
        yield partial
        _sync_one(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):  # what safetensors raises on a full disk
            reason = getattr(error, "strerror", None) or str(error)
            raise TruedepthError(
                f"Writing {path} failed: {reason}. Fix that, then run the same command again: it"
                " resumes from there.",
                exit_code=1,
            ) from error
        raise


@contextmanager
def _partial(
    out: Path, force: bool, written: Callable[[Path], Path], kept: Path | None = None
) -> Iterator[Path]:
    """A hidden directory to write to; `written` gives the part of it that becomes `out`."""
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
    """Whether `partial` is still what was locked: its owner, or we since, may have renamed it."""
    return partial.exists() and partial.stat().st_ino == os.fstat(lock).st_ino


def locked_directory(directory: Path, *, busy: str, where: Path | None = None) -> int:
    """Make a directory and lock it; the lock ends with the process, however that ends.

    Args:
        directory: Made if it does not exist.
        busy: The error message if another run holds the lock.
        where: The path to name in the error if it cannot be made; by default `directory`.

    Returns:
        The lock: a descriptor to close.

    Raises:
        TruedepthError: The directory is locked, or cannot be made.
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
    """Remove what a run that was killed just after writing `out` left beside it."""
    kept = [beside(out, what) for what in ("calibration", "healing")]
    used_up = [path for path in kept if (path / USED_UP).exists() or _is_empty(path)]
    for path in (beside(out, "partial"), beside(out, "replaced"), *used_up):
        if path.is_dir():
            with suppress(TruedepthError):  # another run is at work there, or removal fails
                lock = locked_directory(path, busy="")
                discard(path)
                os.close(lock)
        else:
            with suppress(OSError):
                path.unlink()


def discard(directory: Path) -> None:
    """Remove a directory, and its used-up mark last, for a kill may fall in between."""
    with suppress(OSError):  # what stays does no harm
        for entry in sorted(directory.iterdir(), key=lambda entry: entry.name == USED_UP):
            _remove(entry)
        directory.rmdir()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def empty(directory: Path) -> None:
    """Remove everything in a directory."""
    for entry in directory.iterdir():
        _remove(entry)


def _sync(written: Path) -> None:
    """Flush contents to the disk; the rename that declares them whole must come after."""
    for path in (*written.rglob("*"), written):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(written: Path, out: Path, replaced: Path) -> None:
    """Put `written` in the place of `out`, in one step if possible; a failure restores `out`."""
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
    """Exchange two names in one step; False where the system or the file system cannot."""
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
    """Refuse an output that contains the source, also through its links, or lies inside it.

    Raises:
        TruedepthError: It does.
    """
    links = list(source.iterdir()) if source.is_dir() else []
    for path in {source.resolve(), *(link.resolve() for link in links)}:
        if out == path or out in path.parents:
            raise TruedepthError(
                f"The output {out} contains the source {path}; choose another output."
            )
    if source.is_dir() and source.resolve() in out.parents:
        raise TruedepthError(
            f"The output {out} is inside the source {source}; choose another output."
        )
