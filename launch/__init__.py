"""Starting processes: on this machine, or on a cluster. Run from a checkout."""
