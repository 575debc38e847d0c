"""`dsmoe serve`: flags to a `ServeConfig`, and the extra that it needs."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe_jax.cli.streams import print_status
from dsmoe_jax.errors import DSMoEError


def run(model: Mapping[str, Any], flags: Mapping[str, Any], check_devices: Callable[[], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Args:
        model: The flags of a model.
        flags: The flags of the server.
        check_devices: Raises `DSMoEError` without a device.

    Raises:
        DSMoEError: A flag is out of range, the extra `serve` is missing, or the model cannot be loaded.
    """
    try:
        from dsmoe_jax.serve.run import serve
    except ImportError as error:
        raise DSMoEError(f"a server needs the extra serve ({error}): pip install 'dsmoe_jax[serve]'") from None
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.serve.config import ServeConfig

    options = dict(model)
    path = str(options.pop("path"))
    name, folder = _adapter(options.pop("adapter", ()))
    base = path if not Path(path).is_dir() else Path(path).absolute().name
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

    serve(load, config, started=print_status)


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
        return Path(value).absolute().name, value
    if not name or not folder:
        raise DSMoEError(f"--adapter must be NAME=DIR or DIR, got {value!r}")
    return name, folder
