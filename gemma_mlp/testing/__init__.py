"""What tests and benchmarks compare the package with."""
