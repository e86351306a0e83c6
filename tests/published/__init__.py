"""Tests of `palcache.published.layout`."""
