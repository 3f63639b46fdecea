"""What scripts/plan.py does: the program it compiles, the chips' figures, the search."""
