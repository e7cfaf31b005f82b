"""`vdr eval`, and the held-out evaluations of a training run."""
