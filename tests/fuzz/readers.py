"""The readers: each makes an input in a folder from a random generator, and reads it."""

import json
from pathlib import Path

from qjax.checkpoints.load import load
from tests.fuzz import folders, ggufs, seeds, texts, trainings

READERS = folders.READERS | ggufs.READERS | trainings.READERS | texts.READERS


def read_unchanged(folder: Path) -> int:
    """Reads the models and tokenizers as they are before any change; their number."""
    files = [*seeds.models(), *({"tokenizer.json": json.dumps(tree).encode()} for tree in seeds.tokenizers())]
    for number, each in enumerate(files):
        place = folder / str(number)
        place.mkdir()
        for name, content in each.items():
            (place / name).write_bytes(content)
        read = ggufs.read_tokenizer if "tokenizer.json" in each and len(each) == 1 else load
        read(place)
    return len(files)
