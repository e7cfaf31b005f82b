"""The heart: dropout members, information measures, bonus."""
