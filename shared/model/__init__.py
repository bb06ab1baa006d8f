"""The student model, written from scratch."""
