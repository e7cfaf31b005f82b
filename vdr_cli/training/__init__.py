"""Everything that `vdr train` needs around the algorithm in train.py."""
