"""Hypothesis tries 30 examples for each test in the quick run, and 300 if slow tests are selected too."""

from hypothesis import settings


def pytest_configure(config):
    settings.register_profile("quick", max_examples=30)
    settings.register_profile("full", max_examples=300)
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "full")
