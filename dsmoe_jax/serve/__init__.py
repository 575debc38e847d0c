"""An OpenAI-compatible HTTP server over the engine. Start at `run.serve`, then `app.py` and `worker.py`."""
