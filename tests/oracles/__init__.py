"""Slow references, written from the papers in plain Python loops over float64 numbers; they share no code with us."""
