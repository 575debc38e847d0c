"""`dsmoe serve`: flags to a `ServeConfig`, and the extra that it needs."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe_jax.cli.streams import print_status
from dsmoe_jax.errors import DSMoEError

_log = logging.getLogger("dsmoe_jax")


def run(model: Mapping[str, Any], flags: Mapping[str, Any], check_devices: Callable[[], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Args:
        model: The flags of a model.
        flags: The flags of the server.
        check_devices: Raises `DSMoEError` without a device.

    Raises:
        DSMoEError: A flag is out of range, the extra `serve` is missing, or the model cannot be loaded.
        KeyboardInterrupt: A second signal ended the server.
    """
    listening = False

    def started(line: str) -> None:
        nonlocal listening
        listening = True
        print_status(line)

    try:
        _serve(model, flags, check_devices, started)
    except KeyboardInterrupt:
        if listening:
            raise
        _log.info("Stopping: the model was not loaded yet")


def _serve(
    model: Mapping[str, Any],
    flags: Mapping[str, Any],
    check_devices: Callable[[], None],
    started: Callable[[str], None],
) -> None:
    try:
        from dsmoe_jax.serve.run import serve
    except ImportError as error:
        raise DSMoEError(f"a server needs the extra serve ({error}): pip install 'dsmoe_jax[serve]'") from None
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.serve.config import ServeConfig

    options = dict(model)
    path = str(options.pop("path"))
    name, folder = _adapter(options.pop("adapter", ()))
    base = _model_name(path) if Path(path).is_dir() else path
    fields = {
        "allow_origins" if flag == "allow_origin" else "model_name" if flag == "served_model_name" else flag: value
        for flag, value in flags.items()
    }
    if (key := os.environ.get("DSMOE_API_KEY")) is not None:
        fields.setdefault("api_key", key)
    fields.setdefault("model_name", name or base)
    fields["allow_origins"] = tuple(fields.get("allow_origins", ()))
    config = ServeConfig(**fields, base_name=None if folder is None else base)
    if folder is not None:
        options["adapter"] = folder

    def load() -> Generator:
        check_devices()
        return Generator.from_pretrained(path, **options)

    serve(load, config, started=started)


def _adapter(values: Sequence[str]) -> tuple[str | None, str | None]:
    """Return name and folder of `NAME=DIR` or `DIR`."""
    if not values:
        return None, None
    if len(values) > 1:
        raise DSMoEError(
            f"--adapter: one adapter a server, as all rows of a batch share its weights, got {len(values)}"
        )
    value = values[0]
    name, equals, folder = value.partition("=")
    if not equals or Path(value).is_dir():
        return _model_name(value), value
    if not name or not folder:
        raise DSMoEError(f"--adapter must be NAME=DIR or DIR, got {value!r}")
    return name, folder


def _model_name(folder: str) -> str:
    """Return the name of a folder, or of the run that it is in, such as RUN of `RUN/model`."""
    path = Path(os.path.abspath(folder))  # without `..`; names of links stay
    return path.parent.name if (path.parent / "run.json").is_file() else path.name
