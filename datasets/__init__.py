"""Images: packing into shards, the index, reading, S3, and named assets."""
