"""The model in training: how it is loaded, spread over ranks, called and moved.

Of the trainer's other parts it imports the configuration alone: it writes no files, and is handed data sets and batches
without importing what makes them.  ``run`` and everything above it (evaluation, warm-up, loop) may import it; ``data``
must not::

    models        the policy and its tokenizer: a folder, a hub name, or a small model made on the spot
    distributed   Ranks: all that processes have to say to each other
    policy        Policy: the model on one device, copied or sharded; uses distributed
    scoring       loss of a batch, log-probabilities of a batch or of a whole data set; uses distributed
    optim         optimizer, schedule, clipping, projection, averaged iterate; uses distributed
"""
