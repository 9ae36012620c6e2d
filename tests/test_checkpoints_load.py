"""load("bundled"), and a golden test of it: perplexities pinned on a text that no Python version changes."""

import jax
import jax.numpy as jnp
import pytest

from qjax.checkpoints.load import load
from qjax.driver.decoder import quantize
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.perplexity import perplexity

TEXT = """The queue module
================

This module implements a small queue of jobs for programs that have more work than time. A job is any callable object
without arguments; it is put at the end of the queue and taken from the front. The functions defined here are safe to call
from several threads, because each of them holds a lock while it looks at the queue.

class JobQueue(maxsize=0, *, name=None)

   Return a new queue object. If *maxsize* is given and greater than zero, it is the largest number of jobs that the queue
   can hold; otherwise the size of the queue is not limited. The *name* argument must be a string or None, and is used only
   when the queue is printed. A TypeError is raised if *maxsize* is not an integer.

   put(job, block=True, timeout=None)

      Put a job into the queue. If *block* is true and the queue is full, wait until another thread has taken a job away. If
      *timeout* is a positive number, wait at most that many seconds, and raise the Full exception if there was no free slot
      within that time. If *block* is false, the *timeout* is ignored and the exception is raised at once.

   get(block=True, timeout=None)

      Remove and return the first job of the queue. The arguments have the same meaning as those of the put() method, except
      that the Empty exception is raised when no job was available.

   size()

      Return the number of jobs in the queue. Note that another thread may change the queue before the caller can use this
      value, so that size() > 0 does not mean that a call of get() will not block.

Example of a worker that runs every job until it finds the value None:

    import threading
    from jobs import JobQueue

    def worker(queue):
        while True:
            job = queue.get()
            if job is None:
                break
            try:
                job()
            except Exception as error:
                print("job failed:", error)

    queue = JobQueue(maxsize=10)
    thread = threading.Thread(target=worker, args=(queue,))
    thread.start()
    for i in range(20):
        queue.put(lambda i=i: print(i * i))
    queue.put(None)
    thread.join()

The order in which jobs are finished is the order in which they were put, as long as there is one worker. With more than
one worker no order is guaranteed, and a job should not depend on the result of another job in the same queue.

exception Full

   Raised when a job is put into a queue that already has the largest allowed number of jobs.

exception Empty

   Raised when a job is requested from a queue that has none. It is a subclass of LookupError, so that existing code which
   catches this error for lists and dictionaries continues to work.

See also the threading module, which provides the locks that are used here, and the multiprocessing module, whose queues can
be shared by processes. If the program uses coroutines instead of threads, use the queue of the asyncio package.
"""
PINNED = {"none": 12.333, "rtn:int4-g128": 13.025, "rtn:int2-g128": 79.188, "nf4": 12.906}


@pytest.fixture(scope="module")
def bundled():
    return load("bundled")


def test_the_bundled_model(bundled):
    leaves = jax.tree.leaves(bundled.params)
    assert sum(leaf.size for leaf in leaves) == 1_312_384
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert bundled.name == "bundled" and bundled.config.context == 256
    assert bundled.tokenizer.vocabulary_size == bundled.config.vocabulary_size == 1024
    assert bundled.tokenizer.decode(bundled.tokenizer.encode(TEXT)) == TEXT


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the values are those of float32 arithmetic on a CPU")
@pytest.mark.parametrize("recipe", PINNED)
def test_pinned_perplexity(bundled, recipe):
    model, _ = quantize(bundled, recipe)
    result = perplexity(model, Corpus("pinned", (TEXT,), ""), "windows-256")
    assert (result.tokens, result.nbytes) == (4 * 255, 2709)
    assert result.value == pytest.approx(PINNED[recipe], rel=2e-4)
