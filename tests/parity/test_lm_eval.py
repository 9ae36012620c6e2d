"""Accuracies against lm-evaluation-harness's own Hugging Face backend: the same questions, answered the same way.

Both read the same task files and the same checkpoint folder in float32. Log-likelihoods of a choice, sums over its tokens,
agree to 1e-3 nats, and the answers are the same.
"""

import gzip
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM  # whatever libraries warn of as they are imported is ignored here

from lm_eval.tasks import TaskManager  # noqa: E402

from qjax.checkpoints.load import load  # noqa: E402
from qjax.driver.decoder import quantize  # noqa: E402
from qjax.errors import QjaxError  # noqa: E402
from qjax.evaluate.choices import accuracy  # noqa: E402
from qjax.evaluate.lm_eval import LM, evaluate  # noqa: E402
from qjax.evaluate.perplexity import measure  # noqa: E402
from qjax.evaluate.windows import corpus_windows, parse_convention  # noqa: E402
from tests.paths import real_data  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # the harness and its libraries warn a lot

QUESTIONS = 80
LONGEST = 250  # characters of a choice: the harness refuses those longer than a model's context (256 tokens, here characters)
TOLERANCE = 1e-3  # nats
CHOICES = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
METRICS = "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
TASKS = {  # name -> (file, how the harness is told to ask)
    "arc_easy": ("arc_easy.jsonl", CHOICES + METRICS + 'doc_to_text: "{{query}}\\nAnswer:"\n'),
    "piqa": ("piqa.jsonl", CHOICES + METRICS + 'doc_to_text: "{{query}}Answer:"\n'),
    "openbookqa": ("openbook_qa.jsonl", CHOICES + METRICS + "doc_to_text: query\n"),
    "winogrande": (
        "winogrande.jsonl",
        "output_type: multiple_choice\ndoc_to_choice: context_options\ndoc_to_target: continuation\ndoc_to_text: gold\n"
        + METRICS,
    ),
    "lambada": (
        "lambada_openai.jsonl.gz",
        'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: " {{continuation}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: perplexity\n",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The harness's task files, over the first questions of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (file, asked) in TASKS.items():
        path = real_data(f"tasks/{file}")
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        lines = [line for line in text.split("\n") if line and _longest(json.loads(line)) <= LONGEST][:QUESTIONS]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        _describe(folder, name, asked)
    pages = real_data("text/wikitext2/wiki.test.raw").read_text().split("\n = ")[1:9]
    (folder / "wikitext.jsonl").write_text("".join(json.dumps({"page": page[:3000]}) + "\n" for page in pages))
    perplexities = "".join(f"  - metric: {metric}\n" for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"))
    rolling = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\nmetric_list:\n' + perplexities
    _describe(folder, "wikitext", rolling)
    return folder


def _longest(question):
    return max(map(len, question.get("choices", [question.get("continuation", "")])))


def _describe(folder, name, asked):
    location = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / name}.jsonl\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{location}{asked}")


@pytest.fixture(scope="module", params=["stories260K-hf", "babyllama-hf"])
def pair(request):
    """The harness's model and ours."""
    path, model = real_data(f"models/{request.param}"), load(real_data(f"models/{request.param}"))
    # The folders have no tokenizer_config.json, which would name these two for the harness.
    names = {name: model.tokenizer.inner.id_to_token(getattr(model.config, f"{name}_id")) for name in ("bos", "eos")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, bos_token=names["bos"], eos_token=names["eos"])
    return HFLM(pretrained=str(path), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=16), model


def run(model, folder, *names):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = [f"local_{name}" for name in names]
    return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)


def responses(found, name):
    """[(ln p, greedy) of each choice] of each question in order."""
    samples = sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    return [[(float(value), bool(greedy)) for ((value, greedy),) in _nested(sample["resps"])] for sample in samples]


def _nested(resps):
    return [response if isinstance(response[0], (list, tuple)) else [response] for response in resps]


@pytest.fixture(scope="module")
def harness(pair, folder):
    return run(pair[0], folder, *TASKS, "wikitext")


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_answered_as_the_harness_does(pair, harness, folder, name):
    expected, figures = responses(harness, name), harness["results"][f"local_{name}"]
    found = accuracy(pair[1], f"{name}:{folder / name}.jsonl")
    assert len(expected) == len(found.gold) == QUESTIONS
    largest = 0.0
    for ours, theirs in zip(found.loglikelihoods, expected, strict=True):
        difference = np.abs(np.array(ours) - [value for value, _ in theirs])
        largest = max(largest, float(difference.max()))
    assert largest < TOLERANCE
    print(f"{name}: largest difference of a log-likelihood {largest:.1e}")
    assert found.value == pytest.approx(figures["acc,none"], abs=1e-12)
    if found.kind == "last-word":
        assert [answer == 0 for answer in found.answers] == [greedy for ((_, greedy),) in expected]
        assert found.perplexity == pytest.approx(figures["perplexity,none"], rel=1e-4)
        return
    assert list(found.answers) == [int(np.argmax([value for value, _ in scores])) for scores in expected]
    assert found.normalised == pytest.approx(figures["acc_norm,none"], abs=1e-12)


def test_our_adapter_gives_the_harness_figures(pair, harness, folder):
    found = run(LM(pair[1]), folder, *TASKS, "wikitext")
    for name in TASKS:
        for ours, theirs in zip(responses(found, name), responses(harness, name), strict=True):
            np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], atol=TOLERANCE)
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for task, figures in harness["results"].items():
        for metric, value in figures.items():
            if metric.endswith(",none") and "stderr" not in metric:
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_windows_perplexity_is_torchs(pair):
    """The other convention: non-overlapping windows of the model's context, every token but the first scored."""
    from qjax.evaluate.corpora import load_corpus

    reference, model = pair
    corpus = load_corpus(f"text:{real_data('text/wikitext2/wiki.test.raw')}")
    convention = parse_convention("windows-2048").clipped(model.config.context)
    windows = corpus_windows(model, corpus, convention, 8)
    with torch.no_grad():
        logits = reference.model(torch.tensor(windows.tokens.astype(np.int64))).logits[:, :-1].double()
    logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(windows.tokens[:, 1:, None].astype(np.int64)))
    assert measure(model, windows, convention, corpus).value == pytest.approx(math.exp(-logp.mean().item()), rel=1e-5)


def test_generation_until_a_stop(pair):
    from lm_eval.api.instance import Instance

    options = {"until": [".", "\n\n"], "max_gen_toks": 40, "do_sample": False}
    prompts = ["Once upon a time", "Lily and Tom went to the", "The big dog", "One day, a little boy named Tim found a"]
    instances = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(options)), idx=i, metadata=("t", i, 1))
        for i, prompt in enumerate(prompts)
    ]
    single = HFLM(pretrained=pair[0].model, tokenizer=pair[0].tokenizer, batch_size=1)  # left padding would change positions
    expected = single.generate_until(instances, disable_tqdm=True)
    assert LM(pair[1], batch_size=3).generate_until(instances) == expected
    assert any(len(text) > 10 for text in expected)


def test_quantized_and_packed_models_run(pair, folder):
    quantized, _ = quantize(pair[1], "rtn:int4-g32")
    found = evaluate(quantized, ["local_piqa", "local_wikitext"], folder=folder, limit=20, packed=True)
    assert 0 <= found["local_piqa"]["acc,none"] <= 1
    again = evaluate(quantized, ["local_wikitext"], folder=folder, limit=20)["local_wikitext"]
    assert again["word_perplexity,none"] == pytest.approx(found["local_wikitext"]["word_perplexity,none"], rel=1e-4)


def test_unknown_tasks_get_the_nearest(tiny_model, folder):
    with pytest.raises(QjaxError, match="did you mean local_piqa"):
        evaluate(tiny_model, ["local_pica"], folder=folder)
    with pytest.raises(QjaxError, match="does not exist"):
        evaluate(tiny_model, ["piqa"], folder=folder / "missing")
