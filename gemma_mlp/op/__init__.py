"""The feed-forward itself."""
