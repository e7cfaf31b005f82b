"""What we know about Hugging Face decoders: anatomy, loading, log-probabilities, the prompt cache."""
