"""Render chat templates in Jinja's sandbox; the subprocess of template_worker.py. Start at `render`.

Templates can use transformers' extensions: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop
controls and `{% generation %}`. This file imports nothing from the package, so that it starts fast and without jax.

Protocol: stdin and stdout carry frames of an 8-byte little-endian size and that many bytes. A request is JSON,
{"template": …, "variables": {…}}; a response is a status byte, `+` or `-`, and the rendered text or the error in UTF-8.
"""

import functools
import json
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO, Final, NoReturn

SECONDS: Final = 5
MEGABYTES: Final = 512
CHARACTERS: Final = 16_000_000  # far above any context window
_ERROR_CHARACTERS: Final = 500
_ITERATING_FILTERS: Final = ("map", "select", "selectattr", "reject", "rejectattr")


def render(template: str, variables: dict[str, Any]) -> str:
    """Render a template; content that is a list of text parts is joined if the template does not iterate over parts."""
    compiled, takes_parts = _compile(template)
    if not takes_parts:
        variables = {**variables, "messages": [_join_parts(message) for message in variables.get("messages") or ()]}
    pieces, length = [], 0
    for piece in compiled.generate(variables):
        length += len(piece)
        if length > CHARACTERS:
            raise ValueError(f"it wrote more than {CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> tuple[Any, bool]:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks assistant text, which is rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> str:
            return caller()

    # trim_blocks and lstrip_blocks as in transformers; published templates depend on both.
    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.filters["tojson"] = _tojson
    return environment.from_string(template), _takes_parts(environment.parse(template), nodes)


def _takes_parts(tree: Any, nodes: Any) -> bool:
    """Return whether a template iterates over message content or reads the `text` of a part."""
    names = {"content"}  # variables, parameters and fields with content

    def key(node: Any) -> Any:
        match node:
            case nodes.Getattr():
                return node.attr
            case nodes.Getitem(arg=nodes.Const()):
                return node.arg.value
            case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(), *_]):
                return node.args[0].value
        return None

    def is_content(node: Any) -> bool:
        match node:
            case nodes.Name():
                return node.name in names
            case nodes.Filter():
                return node.node is not None and is_content(node.node)
            case nodes.CondExpr():
                return is_content(node.expr1) or is_content(node.expr2)
            case nodes.Or() | nodes.And():
                return is_content(node.left) or is_content(node.right)
        return key(node) in names or (isinstance(node, nodes.Getitem) and is_content(node.node))

    def bindings() -> Iterator[tuple[str, Any]]:
        parameters = {macro.name: [one.name for one in macro.args] for macro in tree.find_all(nodes.Macro)}
        for node in tree.find_all((nodes.Assign, nodes.Call)):
            match node:
                case nodes.Assign(target=nodes.Name()):
                    yield node.target.name, node.node
                case nodes.Assign(target=nodes.NSRef()):
                    yield node.target.attr, node.node
                case nodes.Call():
                    yield from ((keyword.key, keyword.value) for keyword in node.kwargs)
                    yield from zip(parameters.get(getattr(node.node, "name", None), ()), node.args, strict=False)

    bound = list(bindings())
    while new := {name for name, value in bound if is_content(value)} - names:
        names |= new

    def reads_parts(node: Any) -> bool:
        match node:
            case nodes.For():
                return is_content(node.iter)
            case nodes.Filter():
                by_part = node.name in _ITERATING_FILTERS or any(keyword.key == "attribute" for keyword in node.kwargs)
                return by_part and is_content(node)
        return key(node) == "text" and is_content(node.node.node if isinstance(node, nodes.Call) else node.node)

    kinds = (nodes.For, nodes.Filter, nodes.Getattr, nodes.Getitem, nodes.Call)
    return any(map(reads_parts, tree.find_all(kinds)))


def _join_parts(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's tojson escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _respond(request: bytes) -> bytes:
    try:
        return b"+" + render(**json.loads(request)).encode("utf-8", "surrogatepass")
    except MemoryError:
        reason = f"it needed more than {MEGABYTES} MB of memory"
    except RecursionError:
        reason = "its recursion is too deep"
    except Exception as error:  # the template is an untrusted program and may raise anything
        reason = " ".join(str(error)[: 4 * _ERROR_CHARACTERS].split()) or type(error).__name__
    return b"-" + reason[:_ERROR_CHARACTERS].encode("utf-8", "backslashreplace")


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, (_, hard) = MEGABYTES << 20, resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _limit_time(seconds: float) -> None:
    # The signal ends the process even within a long multiplication in C.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _serve(requests: BinaryIO, responses: BinaryIO, seconds: float) -> None:
    while len(head := requests.read(8)) == 8:
        request = requests.read(int.from_bytes(head, "little"))
        _limit_time(seconds)
        response = _respond(request)
        _limit_time(0)
        responses.write(len(response).to_bytes(8, "little"))
        responses.write(response)
        responses.flush()


if __name__ == "__main__":
    sys.path = sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _compile("")
    _limit_memory()
    _serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
