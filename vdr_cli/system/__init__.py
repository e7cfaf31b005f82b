"""The lowest layer: child processes, signals, and text that is safe to show."""
