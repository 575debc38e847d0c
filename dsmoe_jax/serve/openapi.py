"""The OpenAPI document of the server: `document`."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import dsmoe_jax

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_JSON: Final = "application/json"


def document(bodies: Mapping[str, type[BaseModel]], pages: Mapping[str, str]) -> dict[str, Any]:
    """Return the document.

    Args:
        bodies: Schema of the body of each path for POST.
        pages: Media type of each path for GET.

    Returns:
        An OpenAPI 3.1 document.
    """
    template = "#/components/schemas/{model}"
    schemas = models_json_schema([(body, "validation") for body in bodies.values()], ref_template=template)[1]["$defs"]
    responses = {
        "200": {"description": "Success.", "content": {_JSON: {}, "text/event-stream": {}}},
        "default": {
            "description": "An error.",
            "content": {_JSON: {"schema": {"$ref": template.format(model="Error")}}},
        },
    }
    paths: dict[str, Any] = {}
    for path, body in bodies.items():
        content = {_JSON: {"schema": {"$ref": template.format(model=body.__name__)}}}
        request = {"required": True, "content": content}
        summary = (body.__doc__ or "").splitlines()[0]
        paths[path] = {"post": {"summary": summary, "requestBody": request, "responses": responses}}
    for path, media in pages.items():
        success = {"200": {"description": "Success.", "content": {media: {}}}}
        paths[path] = {"get": {"responses": success | {"default": responses["default"]}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsmoe serve", "version": dsmoe_jax.__version__},
        "paths": paths,
        "components": {"schemas": schemas | {"Error": _ERROR}},
    }
