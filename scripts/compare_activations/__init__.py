"""What scripts/compare_activations.py measures: gates and activations, at equal parameters."""
