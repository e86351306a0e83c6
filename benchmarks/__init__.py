"""Benchmarks: what palcache's speed and accuracy are, each beside what it is measured against.

`python -m benchmarks` runs all of them and `python -m benchmarks read train` some; results stand in `results/`, one file
a machine. Every ratio is of two things timed in turn in one run.
"""
