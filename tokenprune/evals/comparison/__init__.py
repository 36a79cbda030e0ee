"""`tokenprune compare`: models, methods and budgets in one run, and a page to read the answer from."""
