"""The parts of scripts/plan.py: the chips, the program to compile, what one attempt found, and the search."""
