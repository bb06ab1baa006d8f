"""How fast models are."""
