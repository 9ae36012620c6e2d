"""Our models in lm-evaluation-harness (the extra "lm-eval"): any of its tasks, quantized or not.

    from qjax.evaluate.lm_eval import LM
    lm_eval.simple_evaluate(LM(qjax.load("bundled")), tasks=[...])

This module imports the harness; nothing else in qjax does.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM as HarnessModel
    from lm_eval.api.registry import register_model
except ImportError as error:
    from qjax.errors import QjaxError

    raise QjaxError(f"lm-evaluation-harness cannot be imported ({error}): pip install lm-eval") from error

from qjax.checkpoints.load import load
from qjax.errors import QjaxError
from qjax.evaluate.generate import ends, generate
from qjax.evaluate.likelihood import encode, likelihoods, make_pair, require_tokenizer, rolling_pairs
from qjax.models.model import Model, runnable

BATCH = 8  # sequences generated at a time
NEW_TOKENS = 256  # the harness's default


@register_model("qjax")
class LM(HarnessModel):
    """A model of ours as the harness calls it."""

    def __init__(
        self,
        pretrained: Model | str,
        *,
        packed: bool = False,
        compute: str | None = None,
        batch_size: int | str = BATCH,
        **_: object,
    ):
        """pretrained: a model or what `qjax.load` takes. packed: multiply with packed kernels. compute: as in `perplexity`.
        batch_size: of generation.
        """
        super().__init__()
        model = load(pretrained) if isinstance(pretrained, str) else pretrained
        require_tokenizer(model)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else BATCH
        self.packed = bool(packed)
        self.model = runnable(model, packed, compute)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether it is the greedy one) of each (context, continuation)."""
        groups = [
            [make_pair(self.model, *request.args) for request in members]
            for _, members in itertools.groupby(requests, key=lambda request: (request.task_name, request.doc_id))
        ]
        found = likelihoods(self.model, groups, packed=self.packed)
        results = list(zip(found.value.tolist(), found.greedy.tolist(), strict=True))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text, in windows of the model's context."""
        results = []
        for request in requests:
            pairs = rolling_pairs(self.model, request.args[0])
            found = likelihoods(self.model, [[pair] for pair in pairs], packed=self.packed)
            results.append(float(found.value.sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, each up to the first of its stop texts."""
        results: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), len(requests[i].args[0])))
        for _, members in itertools.groupby(order, key=lambda i: repr(requests[i].args[1])):
            same = list(members)
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                texts = self._continue([requests[i].args[0] for i in batch], dict(requests[batch[0]].args[1]))
                results |= dict(zip(batch, texts, strict=True))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, results[i])
        return [results[i] for i in range(len(requests))]

    def _continue(self, contexts: list[str], options: dict) -> list[str]:
        tokenizer, limit = self.model.tokenizer, self.model.config.context
        new = int(options.get("max_gen_toks", options.get("max_new_tokens", NEW_TOKENS)))
        if new >= limit:
            raise QjaxError(f"{new} new tokens leave no room for a prompt in {self.model.name}'s context of {limit}")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        sampled = options.get("do_sample", False) or float(options.get("temperature") or 0) > 0
        found = generate(
            self.model,
            [encode(tokenizer, context)[-(limit - new) :] for context in contexts],
            new,
            stop=ends(self.model),
            temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
            packed=self.packed,
            finished=lambda tokens: any(text in tokenizer.decode(tokens) for text in until),
        )
        return [_before(tokenizer.decode(tokens), until) for tokens in found.tokens]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.model.name.replace("/", "__")


def _before(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0]
    return text


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    packed: bool = False,
    compute: str | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of the harness's tasks: {task: {"acc,none": value, "acc_stderr,none": error, ...}}.

    folder: of local task files (YAML), with which no network is needed. limit: the first questions of each task.
    Raises QjaxError for an unknown task (with the nearest) and for data that cannot be fetched.
    """
    import difflib

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise QjaxError(f"folder of task files {folder} does not exist")
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    if folder is not None and any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise QjaxError(f"lm-evaluation-harness has no task {', '.join(unknown)}{hint}")
    try:
        found = simple_evaluate(
            LM(model, packed=packed, compute=compute), tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
        )
    except QjaxError:
        raise
    except OSError as error:  # hub and connection errors
        reason = " ".join(str(error).split())[:160]
        raise QjaxError(
            f"tasks {', '.join(tasks)} cannot be run ({type(error).__name__}: {reason}); offline, give local files"
        ) from error
    return {
        task: {name: value for name, value in figures.items() if isinstance(value, (int, float))}
        for task, figures in found["results"].items()
    }
