"""Shards of film features, their index, the plan of an epoch, and the loader."""
