"""`vdr study`: arms, seeds and beds compared honestly. Runs what is missing, evaluates it, reports it."""
