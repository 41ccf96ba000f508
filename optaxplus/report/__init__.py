"""What was composed: which parameter goes where, and what it costs."""
