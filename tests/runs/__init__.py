"""Tests of `palcache.runs.trainings`."""
