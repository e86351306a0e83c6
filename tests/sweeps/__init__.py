"""Tests of `palcache.sweeps.sweeps`."""
