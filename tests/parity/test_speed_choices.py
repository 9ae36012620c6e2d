"""200 ARC-easy questions on the bundled model: no slower than lm-evaluation-harness with torch, at the harness's best batch."""

import statistics
import time

import pytest

pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM  # whatever libraries warn of as they are imported is ignored here

from lm_eval.api.instance import Instance  # noqa: E402

import qjax  # noqa: E402
from qjax.checkpoints.load import load  # noqa: E402
from qjax.evaluate.choices import accuracy  # noqa: E402
from qjax.evaluate.tasks import load_task  # noqa: E402
from tests.paths import real_data  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

ROUNDS = 3
BATCHES = (1, 8, 32)


def test_arc_easy_is_as_fast_as_the_harness(tmp_path):
    task = load_task(f"arc_easy:{real_data('tasks/arc_easy.jsonl')}", 200)
    ours = load("bundled")
    folder = f"{qjax.__path__[0]}/models/bundled"
    theirs = {size: HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=size) for size in BATCHES}
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=candidate, idx=j, metadata=("arc_easy", i, 1))
        for i, question in enumerate(task.questions)
        for j, candidate in enumerate(question.candidates)
    ]

    def clock(function):
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    first = clock(lambda: accuracy(ours, task))  # compiles
    best = min(BATCHES, key=lambda size: clock(lambda: theirs[size].loglikelihood(requests, disable_tqdm=True)))
    rounds = [
        (clock(lambda: theirs[best].loglikelihood(requests, disable_tqdm=True)), clock(lambda: accuracy(ours, task)))
        for _ in range(ROUNDS)
    ]
    ratio = statistics.median(harness / mine for harness, mine in rounds)
    print(f"harness (batch {best}) {min(rounds)[0]:.2f} s, ours {min(mine for _, mine in rounds):.2f} s, "
          f"paired ratio {ratio:.2f}; ours with compilation {first:.2f} s")  # fmt: skip
    assert ratio >= 1
