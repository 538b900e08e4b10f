"""Prints what scripts need of the table of versions (gdpo_megatron/platform/pins.toml).

    python pins.py ROW KEY            a value: python, base_image, platform, driver
    python pins.py ROW packages       requirements, one a line
    python pins.py ROW beside         the same, of environments of their own

Needs nothing but the standard library: there is no environment yet when it is run.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PINS = Path(__file__).parents[2] / "gdpo_megatron" / "platform" / "pins.toml"


def main(row: str, key: str) -> str:
    """The text to print."""
    table = tomllib.loads(PINS.read_text(encoding="utf-8"))
    if row not in table:
        raise SystemExit(f"no row {row!r} in {PINS.name}; choices: {', '.join(table)}")
    value = table[row].get(key, "")
    if isinstance(value, str):
        return value
    return "\n".join(f"{name}{wanted}" for name, wanted in value.items())


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
