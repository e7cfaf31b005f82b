"""The ensemble of dropout members and the information measures of their predictions."""
