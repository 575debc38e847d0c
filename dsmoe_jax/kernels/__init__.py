"""The operations that cost time, each with one signature and several backends."""
