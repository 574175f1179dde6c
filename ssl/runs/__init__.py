"""What is kept: files, a run's folder, and the lock on it."""
