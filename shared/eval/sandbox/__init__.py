"""Running generated programs under limits."""
