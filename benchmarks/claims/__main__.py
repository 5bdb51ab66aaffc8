"""Run claims, or write their pages. See `python -m benchmarks.claims --help`."""

import sys

from benchmarks.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
