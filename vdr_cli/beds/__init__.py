"""The embedded beds: small tasks with a pretrained model each, on which methods are compared."""
