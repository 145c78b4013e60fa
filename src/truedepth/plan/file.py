"""Plan files: YAML of a bounded size, without aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from truedepth.errors import TruedepthError

MAX_BYTES = 1 << 16  # a plan for 1,000 layers takes about 10 kB


def write_yaml(path: Path, data: dict[str, Any]) -> None:
    """Write plain data as a plan file. An OSError is raised as it comes."""
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    path.write_text(text, encoding="utf-8")


def read_yaml(path: Path) -> object:
    """Read the plain data of a plan file.

    Raises:
        TruedepthError: The file is missing, too large, or not YAML.
    """
    try:
        if path.exists() and not path.is_file():
            raise TruedepthError(f"{path} is not a file.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise TruedepthError(
                f"{path} is too large for a plan file: {size} bytes, more than {MAX_BYTES}."
            )
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        raise TruedepthError(f"Cannot read the plan {path}: {error.strerror}.") from error
    except TruedepthError:
        raise
    except Exception as error:  # PyYAML does not catch what a malformed date or number raises
        raise TruedepthError(f"{path} is not valid YAML.") from error


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: a few bytes of them can stand for gigabytes, and plans do not need them."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)
