"""`cloze`, a task that needs no files: which stretch of a held-out document goes on from here?

Each question is 32 words of a document of the held-out `python-docs` and four stretches of 8 words: the true next ones, and
three from elsewhere in the same document, so that a topic alone does not give it away. Everything follows from hashes, so the
same text gives the same questions; texts differ between Python versions, and the task's fingerprint tells.
"""

import hashlib
import re

from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.questions import Question, multiple_choice

CONTEXT_WORDS, WORDS, DISTRACTORS = 32, 8, 3
EVERY = 2 * (CONTEXT_WORDS + WORDS)  # words from one question to the next


def cloze_questions(corpus: Corpus | None = None) -> list[Question]:
    """Questions in the order of a hash, so that the first ones are a fair sample. corpus: the held-out python-docs if None."""
    corpus = corpus or load_corpus("python-docs")
    found = []
    for number, document in enumerate(corpus.documents):
        words = [match.span() for match in re.finditer(r"\S+", document)]
        # A stretch begins behind a single blank, where any other stretch could stand as well.
        starts = [i for i, (begin, _) in enumerate(words) if i and i + WORDS <= len(words) and document[begin - 1] == " "]
        starts = [i for i in starts if words[i - 1][1] == words[i][0] - 1]
        last = 0
        for at in starts:
            if at - CONTEXT_WORDS < last:
                continue
            others = [i for i in starts if i + WORDS <= at - CONTEXT_WORDS or i >= at + WORDS]
            question = _question(document, words, at, others, seed=f"{number} {at}")
            if question is not None:
                found.append((_hash(f"{number} {at}"), question._replace(document=number)))
                last = at + EVERY - CONTEXT_WORDS
    if not found:
        raise QjaxError(f"cloze: no document of {corpus.name} is long enough for a question")
    return [question for _, question in sorted(found)]


def _question(document: str, words: list[tuple[int, int]], at: int, others: list[int], seed: str) -> Question | None:
    def stretch(start: int) -> str:
        return document[words[start][0] : words[start + WORDS - 1][1]]

    truth, wrong = stretch(at), []
    for other in sorted(others, key=lambda i: _hash(f"{seed} {i}")):
        text = stretch(other)
        if text != truth and text not in wrong:
            wrong.append(text)
        if len(wrong) == DISTRACTORS:
            break
    else:
        return None
    gold = int(_hash(seed)[:8], 16) % (DISTRACTORS + 1)
    context = document[words[at - CONTEXT_WORDS][0] : words[at - 1][1]]
    return multiple_choice(context, [*wrong[:gold], truth, *wrong[gold:]], gold)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
