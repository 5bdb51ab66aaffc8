"""What a student is best taught with: one student, equal tokens, one objective after the other (`docs/objectives.md`).

    python -m benchmarks.objectives --work DIR

It is the claim `objectives` of `python -m benchmarks.claims`, with its options; what the others have run counts here.
"""

import sys

from benchmarks.claims.command import main

if __name__ == "__main__":
    sys.exit(main(only=("objectives",)))
