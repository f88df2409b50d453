"""Host libraries that stg_hooks can guide; each module imports its host only when used."""
