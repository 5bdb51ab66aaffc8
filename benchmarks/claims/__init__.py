"""The papers' claims in miniature, on SmolLM2-135M and Wikipedia: `docs/claims.md`.

    python -m benchmarks.claims --work DIR                        # all of them, three seeds
    python -m benchmarks.claims --work DIR --claim depth-metric   # one
    python -m benchmarks.claims --write                           # the pages, from the newest results file

A trial is a student (how it was pruned) and a lesson (how it is distilled, if it is). A claim is a table of trials and
what the papers say about pairs of them. Trials that several claims name run once.
"""
