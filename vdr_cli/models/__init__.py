"""Knowledge about Hugging Face decoders: anatomy, loading, log-probabilities, the prompt cache."""
