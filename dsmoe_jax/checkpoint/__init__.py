"""Native checkpoints: zarr arrays, a manifest of SHA-256 hashes, loading and saving."""
