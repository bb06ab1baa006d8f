"""Generated programs: completed, run and scored."""
