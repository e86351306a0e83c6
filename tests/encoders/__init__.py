"""Tests of the encoders, with tiny models built in code."""
