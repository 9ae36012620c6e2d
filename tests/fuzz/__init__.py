"""Readers of other people's files, given files that are nearly right.

    python -m tests.fuzz --seconds 120 --seed 7 [--inputs N] [--only READER ...] [--at INDEX]

A reader (`readers.py`) makes an input from a random generator alone, by changing a small valid one (`mutations.py`), and reads
it. What may come of it (`attempt.py`): it is read, or there is a QjaxError of one printable line of at most 1,000 characters;
within 10 s, and within 1 GiB of memory above the file's own size. The work is done in a process of its own (`__main__.py`), so
that an abort, too, is told with the input that caused it.
"""
