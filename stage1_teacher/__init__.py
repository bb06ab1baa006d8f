"""Stage 1: run the frozen teacher once and cache its top-k logits."""
