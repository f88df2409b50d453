"""Which layer? Profiles, sweeps and reports."""
