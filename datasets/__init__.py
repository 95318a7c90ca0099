"""Image data sets: packing into shards, the index, reading, and named assets."""
