"""diffusers: what the calls of a pipeline are for, and the step caches of its models."""
