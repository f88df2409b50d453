"""Look at a model without running it: its layers, what its forwards take and return."""
