"""The vocabulary: labels as its tokens, and one vocabulary that is split over ranks.

    rank 0 holds tokens [0, a), rank 1 [a, b), ...   each sends a row's (base, log-sum seen from there), all combine

    labels     the range of labels, and the token that each row has to predict
    shards     which tokens a rank holds, and what the ranks tell one another before a call
    parallel   the exchange of two numbers a row, and a backend for logits that are one rank's part

Imports ``backends``, ``distributed``, ``arguments``; ``loss`` and ``head`` import it.  Nothing here is public: users
pass ``tp_group`` and ``vocab_start``, or a DTensor, to the functions of ``loss`` and ``head``.
"""
