"""What a skipped layer gives instead."""
