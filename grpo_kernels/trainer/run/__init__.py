"""One run on the disk and on the terminal: what it writes, and reads again when it resumes.

It imports the configuration, ``data`` and ``model``, and none of them imports it.  Evaluation, warm-up, loop and
``report`` may: what they find is kept here::

    directory         the folder: its lock, the names in it, files that are whole or not there
    terminal          names out of a data file, as a terminal may be shown them
    progress          the bar, or a line now and then
    metrics           metrics.jsonl, written and read
    group_report      GroupReport: what an evaluation found, as files and terminal show it
    results           config.yaml, the trained model, summary.json
    reference_cache   the reference's log-probabilities, under a fingerprint
    checkpoint        a step's tensors and scalars, safe against a process or a disk that fails
    state             what goes into a checkpoint, comes back out of it, and must not differ on resuming
"""
