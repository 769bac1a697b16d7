"""Data: aligned shards on disk, the loader, and the built-in earth data."""
