"""What we know about Hugging Face decoders: loading, anatomy, log-probabilities."""
