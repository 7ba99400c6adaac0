"""`python -m mirasol.cost`: what training the 3B model needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mirasol.cost import scale


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mirasol.cost", description=scale.__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--table", action="store_true", help="print the tables")
    chosen.add_argument("--write", type=Path, metavar="PAGE", help="put them between the markers of a page")
    options = parser.parse_args(arguments)
    if options.table:
        print(scale.text())
    else:
        options.write.write_text(scale.replaced(options.write.read_text()))


if __name__ == "__main__":
    main()
