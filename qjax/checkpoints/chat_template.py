"""The chat template of a checkpoint: the Jinja text that makes one text of a chat's messages (`train/chat.py` runs it)."""

from pathlib import Path

from qjax.untrusted import decode, read_bytes, read_json, status

CHAT, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
LARGEST = 2**20  # bytes; those of the wild have up to 30,000


def folder_template(folder: Path) -> str | None:
    """A folder's template, of several the one called default; None where there is none. Raises QjaxError for a broken file."""
    if status(folder / CHAT):
        return decode(read_bytes(folder / CHAT, LARGEST), str(folder / CHAT))
    found = read_json(folder / TOKENIZER_CONFIG).get("chat_template") if status(folder / TOKENIZER_CONFIG) else None
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) and len(found) <= LARGEST else None
