"""The run of scripts/train_toy.py: its configuration, training loop, checkpoints, records and processes."""
