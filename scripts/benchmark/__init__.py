"""What scripts/benchmark.py measures: time, accuracy, memory."""
