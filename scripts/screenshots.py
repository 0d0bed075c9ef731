"""Take the README's pictures of the chat page: a running server, Chromium, and questions asked by typing them.

    python -m scripts.chat_web --temperature 0 &
    python -m scripts.screenshots                                # docs/chat-light.png, chat-dark.png, chat-phone.png
"""

import argparse
import shutil
from pathlib import Path

from nanochat.common import UserError, run_script

QUESTIONS = ["Who are you?", "What is 37 plus 85?"]
LARGE = {"viewport": {"width": 1000, "height": 560}}
PICTURES = {
    "light": LARGE,
    "dark": {**LARGE, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 700}, "has_touch": True, "is_mobile": True},
}
ANSWER_MS = 120_000


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Take the README's pictures of the chat page.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where scripts.chat_web serves")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help=f"may be repeated; default: {QUESTIONS}")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the pictures go")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UserError("scripts.screenshots needs playwright: bash scripts/setup.sh --tests") from None
    if args.chromium is None:
        raise UserError("scripts.screenshots needs Chromium, which is not in the path: apt-get install chromium")
    args.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
            for name, options in PICTURES.items():
                path = args.folder / f"chat-{name}.png"
                take(browser.new_page(**options), args.url, args.ask or QUESTIONS, path)
                print(path, flush=True)
        except Error as error:
            raise UserError(f"no picture of {args.url}: {error.message.splitlines()[0]}") from error


def take(page, url: str, questions: list[str], path: Path) -> None:
    """Ask the questions, one after the other in one conversation, and photograph the page."""
    page.goto(url)
    for i, question in enumerate(questions):
        page.get_by_role("textbox", name="Message", exact=True).fill(question)
        page.get_by_role("button", name="Send").click()
        page.locator(".facts").nth(i).wait_for(state="attached", timeout=ANSWER_MS)  # they come with an answer's end
    page.screenshot(path=path)


if __name__ == "__main__":
    run_script(parse_args, main)
