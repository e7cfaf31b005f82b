"""What a run shows: metrics, live view, completions."""
