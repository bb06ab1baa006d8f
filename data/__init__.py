"""Documents and problems, from MBPP, HumanEval, the standard library or tables."""
