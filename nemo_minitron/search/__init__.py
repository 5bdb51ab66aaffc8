"""From a budget to an architecture: spaces, exact counts, candidates, the order of a race. No torch, no ranks."""
