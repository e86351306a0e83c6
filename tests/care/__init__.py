"""Tests of `palcache.care`."""
