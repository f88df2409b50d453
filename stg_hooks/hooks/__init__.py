"""Change what a module does in one thread, and put it back."""
