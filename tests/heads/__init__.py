"""Tests of `palcache.heads`."""
