"""Write the pages that are made here: `python -m pages`, which `make site` runs."""

from __future__ import annotations

from pages.made import ROOT, pages


def main() -> None:
    """Write what is new or has changed, and name it."""
    for name, text in pages().items():
        file = ROOT / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            print(name)


if __name__ == "__main__":
    main()
