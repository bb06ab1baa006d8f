"""Many students: sweeps, and the proof that distillation helps."""
