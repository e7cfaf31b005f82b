"""The sections of a configuration, one file per concern; schema.py puts them together."""
