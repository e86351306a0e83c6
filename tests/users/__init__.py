"""Tests of `palcache.users`."""
