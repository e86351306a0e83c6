"""Tests of `palcache.storage`."""
