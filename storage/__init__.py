"""Files that outlive a process: local folders and S3 behind one contract, whole or not at all."""
