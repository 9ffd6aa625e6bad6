"""What a benchmark leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def publish(rows: Sequence[dict[str, Any]], table: str, out: Path) -> None:
    """Writes the rows as JSON, prints their table and the file's path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table)
    print(out)
