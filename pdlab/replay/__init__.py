"""What a run's event log is good for: reading it, playing it again, asking another policy."""
