"""Tests of `palcache.pages.pages`."""
