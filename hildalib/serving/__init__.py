"""`hilda serve`: a dLLM behind HTTP, on this machine unless told otherwise.

`guard` lets requests in or not, `batching` decodes those that wait together, `completions` speaks OpenAI's shapes, `jobs` runs the book, `app` puts
them together. Needs the extra `serve`. Entry points: `serve`, `create_app`, `Limits`.
"""

from hildalib import HildaError

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise HildaError(f"`hilda serve` needs the package {error.name}: python -m pip install -c constraints.txt -e \".[serve]\"") from None

from hildalib.serving.app import create_app, serve
from hildalib.serving.guard import Limits

__all__ = ["Limits", "create_app", "serve"]
