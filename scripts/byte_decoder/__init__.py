"""The byte-level decoder that train_toy.py and compare_activations.py train: its text, model, loss and optimizer."""
