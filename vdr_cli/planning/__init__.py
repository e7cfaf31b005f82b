"""The size of a run before it starts: batches, memory, network traffic. No torch."""
