"""Stage 2: train students from a logit cache."""
