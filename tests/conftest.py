"""Tests share the helpers that lie in this folder."""
