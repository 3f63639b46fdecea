"""The toy language model of the training script: an example of use, not a part of the package."""
