"""The model families that can be read and written: the table, and config.json both ways.

A further family is one entry of FAMILIES: a function from config.json to DecoderConfig, its inverse, and a table of module
names (`family.py`). What a file asks for and the decoder cannot do is an error, never ignored.
The names are those of Hugging Face's transformers library.
"""

import dataclasses
from collections.abc import Iterable

from qjax.errors import QjaxError
from qjax.models.config import DecoderConfig
from qjax.models.family import MEMBER, Family
from qjax.models.family_alibi import BLOOM, FALCON, FALCON2
from qjax.models.family_gemma import GEMMA, GEMMA2, GEMMA3
from qjax.models.family_gpt import GPT2, GPT_NEO, GPT_NEOX, OPT
from qjax.models.family_gpt_oss import GPT_OSS
from qjax.models.family_llama import LLAMA, MISTRAL, QWEN2
from qjax.models.family_mixtures import MIXTRAL, QWEN3_MOE
from qjax.models.family_relatives import COHERE, GLM, GLM4, GRANITE, OLMO2, PHI3, QWEN3, SMOLLM3, STABLELM
from qjax.models.walk import block_of
from qjax.untrusted import quoted

FAMILIES = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, GPT2, GPT_NEOX, OPT, GEMMA, GEMMA2, GEMMA3),
        *(QWEN3, OLMO2, SMOLLM3, GRANITE, STABLELM, PHI3, GLM, GLM4, COHERE, GPT_NEO, FALCON, BLOOM, FALCON2),
        *(MIXTRAL, QWEN3_MOE, GPT_OSS),
    )
}
READ = {name: family for name, family in FAMILIES.items() if not family.model_type}  # by model_type


def find_family(config: dict) -> Family:
    """The family that a config.json describes. Raises QjaxError that lists what is supported."""
    name, architectures = config.get("model_type"), config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    by_class = {each.lower(): family for family in READ.values() for each in family.architectures}
    found = {by_class.get(str(each).lower()) for each in architectures}
    family = READ.get(name) if isinstance(name, str) else None
    if name is None and len(found) == 1:
        family = found.pop()
    elif architectures and family not in found:
        family = None
    if family is None:
        raise QjaxError(
            f"unknown architecture: model_type {quoted(name)}, architectures {quoted(architectures)}; "
            f"supported: {', '.join(f'{each.name} ({each.architectures[0]})' for each in READ.values())}"
        )
    return family


def module_names(family: str, paths: Iterable[str]) -> dict[str, str]:
    """What the family's files call the module of each parameter path, or the list of modules that a stack holds; paths without
    a name there are left out.
    """
    if family not in FAMILIES:
        return {}
    tables = FAMILIES[family].modules
    names = {}
    for path in paths:
        module, layer = path.rpartition("/")[0], block_of(path)
        ours = module if layer is None else module.replace(f"block_{layer}/", "block_{i}/", 1)
        theirs = tables.get(ours, tables.get(f"{ours}/{MEMBER}"))
        if theirs is not None:
            names[path] = theirs.replace("{i}", str(layer)).replace(f".{MEMBER}", "")
    return names


def read_config(config: dict) -> DecoderConfig:
    """The DecoderConfig of a config.json. Raises QjaxError for what is missing, malformed or cannot be done."""
    return find_family(config).read(config)


def write_config(config: DecoderConfig) -> dict:
    """A config.json that reads back as `config`, less further ends of text, which stand in generation_config.json. Raises
    QjaxError when its family has no words for some field.
    """
    if config.cache_format is not None:
        raise QjaxError(
            f"a config.json cannot say that the cache is kept in kv:{config.cache_format}; quantize without kv:, or save a "
            "packed folder, which can"
        )
    config = dataclasses.replace(config, other_eos_ids=())
    if config.family not in FAMILIES:
        raise QjaxError(f"unknown family {config.family!r}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    name = family.model_type or family.name
    written = {"architectures": [family.architectures[0]], "model_type": name, **family.write(config)}
    back = dataclasses.asdict(family.read(written))
    lost = {key: value for key, value in dataclasses.asdict(config).items() if back[key] != value}
    if lost:
        raise QjaxError(f"a config.json of the family {family.name} cannot say {lost}")
    return written
