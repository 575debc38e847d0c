"""Strict JSON, user paths, manifests, atomic directories, direct I/O and file locks."""
