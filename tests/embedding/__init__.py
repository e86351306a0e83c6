"""Tests of `palcache.embedding`."""
