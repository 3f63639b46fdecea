"""The parts of scripts/benchmark.py: time, accuracy and memory of the feed-forward, and their figure."""
