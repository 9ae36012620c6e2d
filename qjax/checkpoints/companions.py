"""The files of a tokenizer and of generation that stand beside a model's weights, as every writer of folders gives them on.

What a folder has of them is copied as it is. qjax itself reads few: `tokenizer.json`, a chat template, and the ends of text in
`generation_config.json`; the rest is for the libraries that run the model.
"""

import json
from pathlib import Path

from qjax.checkpoints.chat_template import CHAT, TOKENIZER_CONFIG
from qjax.files import write_atomically
from qjax.folders import standing
from qjax.models.model import Model
from qjax.models.tokenizer import Tokenizer
from qjax.untrusted import read_bytes, refuse_links_out, status

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
COMPANIONS = (
    *(GENERATION, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)


def read_companions(folder: Path | None) -> dict[str, bytes]:
    """Content of the files that a folder has, by name; none of no folder. Raises QjaxError where one cannot be read, or is a
    link out of the folder.
    """
    if folder is None:
        return {}
    folder = standing(folder)
    refuse_links_out(folder, [folder / name for name in COMPANIONS])
    return {name: read_bytes(folder / name) for name in COMPANIONS if status(folder / name)}


def write_companions(new: Path, model: Model, beside: Path | None) -> None:
    """Writes those of the folder `beside`; of what that lacks, what the model knows."""
    for name, content in {**_known(model), **read_companions(beside)}.items():
        write_atomically(new / name, content)


def _known(model: Model) -> dict[str, str]:
    files, tokenizer = {}, model.tokenizer
    if tokenizer is not None:
        files[TOKENIZER] = tokenizer.to_json()
        files[TOKENIZER_CONFIG] = json.dumps(_tokenizer_config(tokenizer), indent=1) + "\n"
        if tokenizer.chat_template:
            files[CHAT] = tokenizer.chat_template
    if model.config.other_eos_ids:
        ends = [i for i in (model.config.eos_id, *model.config.other_eos_ids) if i is not None]
        files[GENERATION] = json.dumps({"eos_token_id": ends}, indent=1) + "\n"
    return files


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, str]:
    """What the transformers library needs to read tokenizer.json as it is."""
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    tokens = {name: tokenizer.inner.id_to_token(i) for name, i in names.items() if i is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **{name: token for name, token in tokens.items() if token}}
