"""Starting the ranks: hostfiles, the deepspeed launcher, environment."""
