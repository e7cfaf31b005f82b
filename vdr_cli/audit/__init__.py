"""`vdr audit`: a run's numbers recomputed in float64 from its own files.

Every formula is written here a second time, from docs/audit.md and the pages it names, and nothing of the
training code is imported: no rollout, members, losses, log-probabilities, engine or loop. What the two
implementations agree on, neither can have wrong alone.
"""
