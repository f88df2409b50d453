"""Compute the predictions of one call, and share what they have in common."""
