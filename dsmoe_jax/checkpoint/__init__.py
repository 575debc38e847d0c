"""Native checkpoints: arrays in zarr files, a manifest of SHA-256 hashes, loading and saving."""
