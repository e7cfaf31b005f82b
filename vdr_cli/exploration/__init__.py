"""Bonus sources and how a bonus becomes an advantage."""
