"""Models as files and as layers: configs, weights, tokenizers, the decoder."""
