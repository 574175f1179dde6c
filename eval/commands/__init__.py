"""The commands, one file each, and what they share: the command line and its help."""
