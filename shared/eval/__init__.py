"""Evaluation: generation, pass@k, fidelity, latency and the report."""
