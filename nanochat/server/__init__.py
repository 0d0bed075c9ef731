"""The HTTP server: OpenAI's chat and completion API, the chat page, health and metrics, over the engine."""

from nanochat.server.app import create_app
from nanochat.server.settings import Defaults, Settings

__all__ = ["Defaults", "Settings", "create_app"]
