"""How close a model is to its teacher, and to the text."""
