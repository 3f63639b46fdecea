"""The study of scripts/compare_activations.py: feed-forwards with and without a gate, at equal parameters."""
