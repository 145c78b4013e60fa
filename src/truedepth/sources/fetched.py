"""Files that stand for others that have not been fetched.

Git LFS, git-annex and DVC keep large files elsewhere. Until these are fetched, a checkout holds in
their place a small text, a link to nothing, or a file `NAME.dvc` beside them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from truedepth.errors import TruedepthError

MAX_POINTER_BYTES = 1024  # Git LFS allows no more; git-annex needs less

POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"version https://hawser.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
"""How a pointer begins, whose it is, and the command that fetches the file."""


def check_fetched(file: Path) -> None:
    """Refuse a file that stands for another; a file that is missing without a trace passes.

    Raises:
        TruedepthError: It is a pointer of Git LFS or git-annex, a link to nothing, or only
            `NAME.dvc` is there.
    """
    with suppress(OSError):  # what else is wrong with the file, its reader says
        if file.is_symlink() and not file.exists():
            target = str(file.readlink())
            command = "dvc pull, git annex get"
            if "annex/objects" in target:
                command = "git annex get"
            elif ".dvc" in target:
                command = "dvc pull"
            raise TruedepthError(
                f"{file} is a link to {target}, which does not exist; fetch it ({command}), or"
                " remove the link."
            )
        dvc = file.with_name(f"{file.name}.dvc")
        if dvc.is_file() and not file.exists():
            raise TruedepthError(f"{file} is missing, and {dvc.name} is there; run dvc pull.")
        if file.is_file() and file.stat().st_size <= MAX_POINTER_BYTES:
            held = file.read_bytes()
            for begin, (owner, command) in POINTERS.items():
                if held.startswith(begin):
                    raise TruedepthError(
                        f"{file} is a pointer of {owner}, {len(held)} bytes, and not the file"
                        f" itself; run {command}."
                    )
