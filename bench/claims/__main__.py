"""The command `python bench/claims`: NAME runs a claim, `page` writes all pages anew."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    # Python has put this folder first; the package `claims` is found in the one above, also by
    # worker processes, which get this path.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from claims import page, suite

    if sys.argv[1:2] == ["page"]:
        return page.main(sys.argv[2:])
    return suite.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
