"""What a run leaves on disk and on the terminal: its directory, checkpoints, metrics, results, progress."""
