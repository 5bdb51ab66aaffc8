"""From a budget to an architecture: spaces, exact counts, candidates, the order of a race. Ranks have no part in it."""
