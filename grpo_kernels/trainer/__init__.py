"""The thin trainer: one readable loop over any ``transformers`` causal LM, for preference pairs in groups."""
