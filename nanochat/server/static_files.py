"""The chat page's files, read once: what is asked for is looked up in a table and never becomes a path."""

from pathlib import Path

FOLDER = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def static_files() -> dict[str, tuple[bytes, str]]:
    """Return {URL path: (content, media type)}: static/index.html as /, any other file as /static/NAME."""
    files = {}
    for path in sorted(FOLDER.glob("*")):
        if path.suffix in MEDIA_TYPES and not path.is_symlink():
            url = "/" if path.name == "index.html" else f"/static/{path.name}"
            files[url] = path.read_bytes(), MEDIA_TYPES[path.suffix]
    return files
