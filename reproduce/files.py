"""JSON that is pleasant to read and to compare."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adv.lab.files import replacing

__all__ = ["digest", "dumps", "read", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write ``dumps(content)``."""
    with replacing(path) as partial:
        partial.write_text(dumps(content) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file's content, or None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def digest(content: Any) -> str:
    """A short name for settings, whatever their order."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dumps(content: Any, indent: int = 0, width: int = 100) -> str:
    """JSON in which what fits into a line stands in one; infinity and NaN become null."""
    line = json.dumps(_finite(content), ensure_ascii=False)
    if len(line) + indent <= width:
        return line
    inner, outer = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(content, Mapping):
        names = [json.dumps(str(key), ensure_ascii=False) + ": " for key in content]
        values = [
            dumps(value, indent + 1, width - len(name))
            for name, value in zip(names, content.values(), strict=True)
        ]
        pairs = (name + value for name, value in zip(names, values, strict=True))
        return "{" + inner + f",{inner}".join(pairs) + outer + "}"
    if isinstance(content, list | tuple) and any(isinstance(v, Mapping | list) for v in content):
        values = [dumps(value, indent + 1, width) for value in content]
        return "[" + inner + f",{inner}".join(values) + outer + "]"
    return line


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
