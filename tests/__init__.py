"""Tests of palcache; the folder mirrors the package."""
