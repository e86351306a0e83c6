"""Caches of every format version, kept for ever."""
