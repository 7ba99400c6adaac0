"""Write the numbers of README.md and docs/results.md from bench/results: `make readme`, or `python bench/readme.py`.

`--check` writes nothing and exits with 1 where the texts are not what the results say.
"""

from __future__ import annotations

import argparse
import sys

from report import documents


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a text differs; write nothing")
    check = parser.parse_args(arguments).check
    try:
        differ = documents.differing()
    except ValueError as error:
        print(f"readme.py: error: {error}", file=sys.stderr)
        return 1
    for path, text in differ.items():
        if not check:
            path.write_text(text)
        print(f"{path} is not what bench/results says: run `make readme`" if check else f"Written: {path}")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
