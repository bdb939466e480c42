"""Write all files that are made here: `python -m manual`, which `make manual` runs."""

from __future__ import annotations

from pathlib import Path

from manual.build import files

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write what is new or has changed, and name it."""
    for name, text in files().items():
        file = ROOT / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            print(name)


if __name__ == "__main__":
    main()
