"""A look inside a cache: documents as text, and what the teacher, and a student, expected at each token."""
