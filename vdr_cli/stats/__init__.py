"""Pure statistics on NumPy arrays: pass@k, intervals, how well an uncertainty ranks errors, diversity of text."""
